//! Credentials of a thread: users, groups, capabilities, securebits, no_new_privs, and whether the process may be
//! dumped (credentials(7), capabilities(7), prctl(2)).
//!
//! Keys and Landlock have rooms of their own.
//!
//! Rebuilding goes from the most privileged state downwards: what needs a capability comes before it is dropped.

use limosa_kernel::proc::{Capabilities, Ids};
use limosa_puppet::{CallId, Outcome, Program};
use serde::{Deserialize, Serialize};

use super::ThreadAttribute;
use crate::error::{CaptureError, RestoreError};
use crate::restore::Inside;
use crate::view::ThreadView;

const SECBIT_NO_SETUID_FIXUP: u64 = 1 << 2;
const CAPABILITY_VERSION_3: u64 = 0x2008_0522;
const SYS_ADMIN: u64 = 1 << 21;
/// Capabilities are numbered from 0; Linux 6.18 knows 41.
const CAPABILITIES: u64 = 64;

/// A thread's credentials.
#[derive(Debug, Serialize, Deserialize)]
pub struct Credentials {
    /// Real, effective, saved and filesystem user.
    pub users: [u32; 4],
    /// Real, effective, saved and filesystem group.
    pub groups: [u32; 4],
    /// Supplementary groups.
    pub supplementary: Vec<u32>,
    /// Inheritable, permitted, effective, bounding and ambient capabilities.
    pub capabilities: [u64; 5],
    /// `SECBIT_*`
    pub securebits: u64,
    /// `PR_SET_NO_NEW_PRIVS`
    pub no_new_privileges: bool,
    /// Whether seccomp is on, and nothing allows to install it once these credentials are set.
    pub held_for_seccomp: bool,
    /// `PR_SET_DUMPABLE`
    pub dumpable: u64,
    /// `PR_SET_PDEATHSIG`: changing users clears it, so it is set after.
    pub parent_death_signal: u64,
}

/// Where the answers will be.
pub struct Asked {
    securebits: CallId,
    dumpable: CallId,
    parent_death_signal: limosa_puppet::Data,
}

fn ids(ids: Ids) -> [u32; 4] {
    [ids.real, ids.effective, ids.saved, ids.fs]
}

impl ThreadAttribute for Credentials {
    type Asked = Asked;

    fn ask(_: &ThreadView, program: &mut Program) -> Result<Asked, CaptureError> {
        let parent_death_signal = program.space(8);
        let arguments = [libc::PR_GET_PDEATHSIG.into(), parent_death_signal.into()];
        program.call("ask for the parent-death signal", libc::SYS_prctl, arguments);
        Ok(Asked {
            securebits: program.call("ask for securebits", libc::SYS_prctl, [libc::PR_GET_SECUREBITS.into()]),
            dumpable: program.call("ask whether dumpable", libc::SYS_prctl, [libc::PR_GET_DUMPABLE.into()]),
            parent_death_signal,
        })
    }

    fn capture(thread: &ThreadView, asked: &Asked, outcome: &Outcome) -> Result<Self, CaptureError> {
        let question = |source| CaptureError::Question { pid: thread.process.pid, source };
        let status = &thread.status;
        let Capabilities { inheritable, permitted, effective, bounding, ambient } = status.capabilities;
        Ok(Self {
            users: ids(status.uid),
            groups: ids(status.gid),
            supplementary: status.groups.clone(),
            capabilities: [inheritable, permitted, effective, bounding, ambient],
            securebits: outcome.result(asked.securebits).map_err(question)?,
            no_new_privileges: status.no_new_privs,
            held_for_seccomp: status.seccomp.is_some_and(|mode| mode != 0)
                && !status.no_new_privs
                && effective & SYS_ADMIN == 0,
            dumpable: outcome.result(asked.dumpable).map_err(question)?,
            parent_death_signal: outcome.word(asked.parent_death_signal, 0) & 0xffff_ffff,
        })
    }

    fn rebuild(&self, program: &mut Program) {
        let mut prctl = |purpose, arguments: [u64; 3]| {
            program.call(purpose, libc::SYS_prctl, arguments.map(Into::into));
        };
        let [inheritable, permitted, effective, bounding, ambient] = self.capabilities;
        // Capabilities survive the change of users; dropped below, exactly.
        prctl("keep capabilities", [libc::PR_SET_SECUREBITS as u64, SECBIT_NO_SETUID_FIXUP, 0]);
        for capability in (0..CAPABILITIES).filter(|bit| bounding & (1 << bit) == 0) {
            // Fails past the last capability that the kernel knows.
            let arguments = [libc::PR_CAPBSET_DROP.into(), capability.into()];
            program.try_call("drop from the bounding set", libc::SYS_prctl, arguments);
        }
        let bytes: Vec<u8> = self.supplementary.iter().flat_map(|group| group.to_le_bytes()).collect();
        let list = program.bytes(&bytes);
        let count = self.supplementary.len();
        program.call("set supplementary groups", libc::SYS_setgroups, [count.into(), list.into()]);
        let [real, set_effective, saved, filesystem] = self.groups;
        program.call("set groups", libc::SYS_setresgid, [real.into(), set_effective.into(), saved.into()]);
        program.try_call("set the filesystem group", libc::SYS_setfsgid, [filesystem.into()]);
        let [real, set_effective, saved, filesystem] = self.users;
        program.call("set users", libc::SYS_setresuid, [real.into(), set_effective.into(), saved.into()]);
        program.try_call("set the filesystem user", libc::SYS_setfsuid, [filesystem.into()]);
        let mut prctl = |purpose, arguments: [u64; 3]| {
            program.call(purpose, libc::SYS_prctl, arguments.map(Into::into));
        };
        prctl("set securebits", [libc::PR_SET_SECUREBITS as u64, self.securebits, 0]);
        let held = if self.held_for_seccomp { SYS_ADMIN } else { 0 };
        let header = program.words(&[CAPABILITY_VERSION_3]);
        let sets = program.bytes(&capability_sets(inheritable, permitted | held, effective | held));
        program.call("set capabilities", libc::SYS_capset, [header.into(), sets.into()]);
        for capability in (0..CAPABILITIES).filter(|bit| ambient & (1 << bit) != 0) {
            let arguments = [libc::PR_CAP_AMBIENT.into(), libc::PR_CAP_AMBIENT_RAISE.into(), capability.into()];
            program.call("raise an ambient capability", libc::SYS_prctl, arguments);
        }
        let mut prctl = |purpose, arguments: [u64; 3]| {
            program.call(purpose, libc::SYS_prctl, arguments.map(Into::into));
        };
        if self.no_new_privileges {
            prctl("set no_new_privs", [libc::PR_SET_NO_NEW_PRIVS as u64, 1, 0]);
        }
        // 2 can only be the consequence of a set-user-ID program; the kernel refuses it as a wish.
        prctl("set whether dumpable", [libc::PR_SET_DUMPABLE as u64, u64::from(self.dumpable == 1), 0]);
        prctl("set the parent-death signal", [libc::PR_SET_PDEATHSIG as u64, self.parent_death_signal, 0]);
    }

    fn finish(&self, _: i32) -> Result<(), RestoreError> {
        Ok(())
    }
}

impl Credentials {
    /// Gives up the capability that the thread kept for installing seccomp. The filters are suspended.
    pub(crate) fn drop_what_seccomp_needed(&self, thread: &mut Inside) -> Result<(), RestoreError> {
        if !self.held_for_seccomp {
            return Ok(());
        }
        let [inheritable, permitted, effective, ..] = self.capabilities;
        let header = thread.bytes(&CAPABILITY_VERSION_3.to_le_bytes())?;
        let sets = thread.bytes(&capability_sets(inheritable, permitted, effective))?;
        thread.call("setting capabilities", libc::SYS_capset, [header, sets, 0, 0, 0, 0])?;
        Ok(())
    }
}

/// The sets as capset(2) takes them, in the 64-bit layout: low halves, then high halves of effective, permitted and
/// inheritable. The header is the version, then PID 0.
fn capability_sets(inheritable: u64, permitted: u64, effective: u64) -> Vec<u8> {
    let low = |set: u64| (set as u32).to_le_bytes();
    let high = |set: u64| ((set >> 32) as u32).to_le_bytes();
    [low(effective), low(permitted), low(inheritable), high(effective), high(permitted), high(inheritable)].concat()
}
