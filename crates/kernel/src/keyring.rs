//! Keyrings (keyrings(7)): those that a user may see, and whether this process is in a session keyring.

use crate::fault;
use crate::{Error, Result};

/// A key of the type `keyring`, as `/proc/keys` lists it (proc_keys(5)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keyring {
    /// Its serial number.
    pub id: i32,
    /// Whether it ends at some time by itself.
    pub expires: bool,
    /// `KEY_*_*`
    pub permissions: u32,
    /// Its owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// Its name.
    pub description: Vec<u8>,
}

impl Keyring {
    /// Whether it is one of those that each user has: `_uid.N`, and `_uid_ses.N`, in which those search who have no session
    /// keyring.
    pub fn is_users(&self) -> bool {
        self.description.starts_with(b"_uid.") || self.is_user_session()
    }

    /// Whether it is `_uid_ses.N`.
    pub fn is_user_session(&self) -> bool {
        self.description.starts_with(b"_uid_ses.")
    }

    /// One as `KEYCTL_DESCRIBE` shows it: `type;uid;gid;permissions;description`.
    pub fn described(id: i32, text: &[u8]) -> Option<Self> {
        let mut fields = text.splitn(5, |byte| *byte == b';');
        let mut field = || std::str::from_utf8(fields.next()?).ok();
        if field()? != "keyring" {
            return None;
        }
        let (uid, gid) = (number(field()?)?, number(field()?)?);
        let permissions = u32::from_str_radix(field()?, 16).ok()?;
        let description = fields.next()?.to_vec();
        Some(Self { id, expires: false, permissions, uid, gid, description })
    }

    /// A line of `/proc/keys`; none for other types of keys.
    ///
    /// `ID flags usage timeout permissions uid gid type description: content`
    fn parse(line: &[u8]) -> Option<Self> {
        let mut rest = line;
        let mut field = || {
            let start = rest.iter().position(|byte| *byte != b' ')?;
            let length = rest[start..].iter().position(|byte| *byte == b' ')?;
            let (field, after) = rest[start..].split_at(length);
            rest = after;
            std::str::from_utf8(field).ok()
        };
        let id = i32::from_str_radix(field()?, 16).ok()?;
        let (_flags, _usage, timeout) = (field()?, field()?, field()?);
        let permissions = u32::from_str_radix(field()?, 16).ok()?;
        let (uid, gid) = (number(field()?)?, number(field()?)?);
        if field()? != "keyring" {
            return None;
        }
        let text = rest.trim_ascii_start();
        let end = text.windows(2).rposition(|pair| pair == b": ")?;
        let description = text[..end].to_vec();
        Some(Self { id, expires: timeout != "perm", permissions, uid, gid, description })
    }
}

/// A user or group. Whom this namespace does not know is shown as −1.
fn number(text: &str) -> Option<u32> {
    text.parse::<i64>().ok().map(|number| number as u32)
}

/// The keyrings that a process with the filesystem user `fsuid` may see, beside those that belong to nobody else's business
/// than the kernel's.
pub fn visible_to(fsuid: u32) -> Result<Vec<Keyring>> {
    const PATH: &str = "/proc/keys";
    fault::point();
    let text = on_a_thread(|| {
        // SAFETY: takes a number only, and acts on the calling thread, which ends here.
        unsafe { libc::syscall(libc::SYS_setfsuid, fsuid) };
        std::fs::read(PATH)
    });
    match text {
        Ok(text) => Ok(parse_all(&text)),
        // A kernel without keys.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(source) => Err(Error::new("read", PATH, source)),
    }
}

fn parse_all(text: &[u8]) -> Vec<Keyring> {
    let lines = text.split(|byte| *byte == b'\n').filter_map(Keyring::parse);
    lines.filter(|keyring| !keyring.description.starts_with(b".")).collect()
}

/// Whether the calling process is in a session keyring, which its children inherit.
pub fn has_session() -> bool {
    const KEYCTL_GET_KEYRING_ID: i32 = 0;
    const KEYCTL_DESCRIBE: i32 = 6;
    const SESSION: i32 = -3;
    fault::point();
    // On a thread of its own: to ask one that has none gives it its user's.
    on_a_thread(|| {
        let mut text = [0_u8; 512];
        // SAFETY: numbers, and a live buffer of the length that is given.
        let length = unsafe {
            let id = libc::syscall(libc::SYS_keyctl, KEYCTL_GET_KEYRING_ID, SESSION, 0);
            libc::syscall(libc::SYS_keyctl, KEYCTL_DESCRIBE, id, text.as_mut_ptr(), text.len())
        };
        // `type;uid;gid;permissions;description`
        let text = text.get(..length.max(0) as usize).unwrap_or(&text);
        let description = text.splitn(5, |byte| *byte == b';').nth(4);
        description.is_some_and(|description| !description.starts_with(b"_uid_ses."))
    })
}

/// Runs `ask` on a thread of its own: credentials are a thread's.
fn on_a_thread<T: Send>(ask: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| match scope.spawn(ask).join() {
        Ok(answer) => answer,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keyrings_are_read_from_their_list() {
        let text = b"02722c89 I--Q---     1 perm 0c030000     0 65534 keyring   .user_reg: 2\n\
            267b4ea2 I--Q---     1 perm 1f3f0000     0 65534 keyring   _uid_ses.0: 1\n\
            32f3a57b I--Q---     5  3d  3f130000  1000    -1 keyring   tea: pot: empty\n\
            21f4d0f0 I--Q---     1 perm 3f010000     0     0 user      x: y: 3\n\n";
        let found = parse_all(text);
        assert_eq!(found.len(), 2);
        assert!(found[0].is_users() && found[0].is_user_session() && !found[0].expires);
        let named = &found[1];
        assert_eq!((named.id, named.description.as_slice()), (0x32f3_a57b, b"tea: pot".as_slice()));
        assert_eq!(
            (named.permissions, named.uid, named.gid, named.expires),
            (0x3f13_0000, 1000, u32::MAX, true)
        );
    }

    #[test]
    fn a_described_keyring_is_read() {
        let read = Keyring::described(7, b"keyring;1000;-1;3f130000;tea;pot").expect("a keyring");
        assert_eq!((read.uid, read.gid, read.permissions), (1000, u32::MAX, 0x3f13_0000));
        assert_eq!(read.description, b"tea;pot");
        assert!(Keyring::described(7, b"user;0;0;3f130000;x").is_none());
    }

    proptest::proptest! {
        #[test]
        fn any_line_is_a_keyring_or_none(line: Vec<u8>) {
            let _ = (Keyring::parse(&line), Keyring::described(1, &line));
            let _ = Keyring::parse(&[b"1 I 1 perm 1 0 0 keyring ", line.as_slice()].concat());
        }
    }

    #[test]
    fn what_a_thread_joins_is_seen() {
        std::thread::spawn(|| {
            let before = visible_to(0).unwrap().len();
            // SAFETY: KEYCTL_JOIN_SESSION_KEYRING of a new one without a name; acts on this thread, which ends.
            assert!(unsafe { libc::syscall(libc::SYS_keyctl, 1, 0) } > 0);
            assert!(has_session());
            let now = visible_to(0).unwrap();
            assert!(
                now.len() > before && now.iter().any(|keyring| keyring.description == b"_ses"),
                "{now:?}"
            );
        })
        .join()
        .unwrap();
    }
}
