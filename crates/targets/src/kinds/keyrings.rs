//! Session keyrings: one with a name, owner and permissions, shared by a process and its child; another child's own,
//! without a name; what is linked in them.

use anyhow::{Context, Result, ensure};

use super::{Setting, Verify};
use crate::child::Child;
use crate::sys::{self, SESSION_KEYRING, USER_KEYRING};

const GET_KEYRING_ID: i32 = 0;
const CHOWN: i32 = 4;
const SETPERM: i32 = 5;
const LINK: i32 = 8;
const UNLINK: i32 = 9;
const READ: i32 = 11;
/// All but setting attributes for whoever has it, viewing for its owner.
const PERMISSIONS: i32 = 0x1f01_0000;

pub fn set_up(setting: &Setting) -> Result<Box<Verify>> {
    sys::join_session_keyring(Some(c"tea: pot"))?;
    sys::keyctl(LINK, [USER_KEYRING, SESSION_KEYRING, 0]).context("linking the user's keyring")?;
    sys::keyctl(CHOWN, [SESSION_KEYRING, 0, 1001]).context("chown")?;
    sys::keyctl(SETPERM, [SESSION_KEYRING, PERMISSIONS, 0]).context("setperm")?;
    let key = sys::add_key("of the parent", SESSION_KEYRING)?;
    let heir = Child::start(&setting.protocol, "heir", |_| {
        Ok(Box::new(|| {
            let found = sys::find_key(c"user", c"of the parent");
            ensure!(found.is_some(), "a key of its parent's is not found");
            Ok(String::new())
        }))
    })?;
    let alone = Child::start(&setting.protocol, "alone", |_| {
        sys::join_session_keyring(None)?;
        Ok(Box::new(|| {
            let (text, links) = session()?;
            ensure!(text.ends_with(";_ses") && links == 0, "{text} with {links} links");
            ensure!(sys::find_key(c"user", c"of the parent").is_none(), "its parent's keys are found");
            Ok(String::new())
        }))
    })?;
    // A key in it would not be carried: it is there while a child is asked only.
    sys::keyctl(UNLINK, [key, SESSION_KEYRING, 0])?;
    Ok(Box::new(move || {
        let (text, links) = session()?;
        let expected = format!("keyring;0;1001;{PERMISSIONS:08x};tea: pot");
        ensure!(text == expected && links == 1, "{text} with {links} links");
        let users = sys::keyctl(GET_KEYRING_ID, [USER_KEYRING, 0, 0])?;
        let name = format!("_uid.{}", rustix::process::getuid().as_raw());
        let found = sys::find_key(c"keyring", &std::ffi::CString::new(name)?);
        ensure!(found == Some(users), "its user's keyring is not linked");
        let key = sys::add_key("of the parent", SESSION_KEYRING)?;
        let verified = heir.verify().and_then(|_| alone.verify());
        sys::keyctl(UNLINK, [key, SESSION_KEYRING, 0])?;
        verified?;
        Ok(String::new())
    }))
}

/// The session keyring's description, and how many links are in it.
fn session() -> Result<(String, usize)> {
    let id = sys::keyctl(GET_KEYRING_ID, [SESSION_KEYRING, 0, 0])?;
    let bytes = sys::keyctl(READ, [id, 0, 0])?;
    Ok((sys::describe_key(id)?, bytes as usize / 4))
}
