//! Landlock (landlock(7)): a thread that has restricted itself is refused, because its rules are shown to nobody.
//!
//! Nor does anything tell that there are some. But one rule is always there: a thread in a Landlock domain may look at those
//! processes only that are in it, too. So each thread is asked to compare itself (kcmp(2)) with a *witness*, a process of its
//! own user, without any capability, that Limosa has made in its PID namespace: but for Landlock nothing forbids it.
//!
//! A witness is a bare child: it has no descriptors, and no memory but the stub and the mailbox that it was made by. So
//! there is nothing in it that a process of that user could take.

use std::collections::HashMap;

use limosa_kernel::namespace::{self, Kind};
use limosa_kernel::proc::{NsKind, ProcDir};
use limosa_kernel::{probe, ptrace};
use limosa_puppet::{CallId, Outcome, Program, ProgramError};

use crate::error::{CaptureError, Refusal};
use crate::guardian::{self, Idle};
use crate::view::ThreadView;

const CAPABILITY_VERSION_3: u64 = 0x2008_0522;
/// `KCMP_VM`
const ADDRESS_SPACES: u64 = 1;

/// The witnesses of a tree, each made when the first thread of its user is asked.
#[derive(Debug)]
pub(crate) struct Witnesses {
    root: i32,
    landlock: bool,
    /// By real user and group; none where it could not be made.
    by_user: HashMap<(u32, u32), Option<Witness>>,
}

/// Dropped, it is killed; nor does it outlive Limosa.
#[derive(Debug)]
struct Witness {
    _process: Idle,
    /// Its ID in the tree's PID namespace.
    own_pid: i32,
}

impl Witnesses {
    /// For the tree rooted at `root`, with a witness for the root's user: that takes a moment.
    pub(crate) fn new(root: i32) -> Self {
        let mut witnesses = Self { root, landlock: probe::landlock().is_ok(), by_user: HashMap::new() };
        if let Ok(status) = ProcDir::open(root).and_then(|proc| proc.status()) {
            witnesses.for_user((status.uid.real, status.gid.real));
        }
        witnesses
    }

    fn for_user(&mut self, user: (u32, u32)) -> Option<i32> {
        if !self.landlock {
            return None;
        }
        let root = self.root;
        let witness = self.by_user.entry(user).or_insert_with(|| match Witness::new(root, user) {
            Ok(witness) => Some(witness),
            Err(error) => {
                let (uid, gid) = user;
                tracing::warn!(uid, gid, %error, "it is not known whether Landlock restricts threads of this user");
                None
            }
        });
        witness.as_ref().map(|witness| witness.own_pid)
    }

    /// Adds the question to a thread.
    pub(crate) fn ask(&mut self, thread: &ThreadView, program: &mut Program) -> Option<CallId> {
        let witness = self.for_user((thread.status.uid.real, thread.status.gid.real))?;
        let arguments = [thread.own_tid.into(), witness.into(), ADDRESS_SPACES.into(), 0.into(), 0.into()];
        Some(program.try_call("see whether Landlock restricts it", libc::SYS_kcmp, arguments))
    }
}

/// Refuses the thread if it is restricted.
pub(crate) fn answer(
    thread: &ThreadView,
    asked: Option<CallId>,
    outcome: &Outcome,
) -> Result<(), CaptureError> {
    let Some(Err(ProgramError::Call { source, .. })) = asked.map(|asked| outcome.result(asked)) else {
        return Ok(());
    };
    if source.raw_os_error() != Some(libc::EPERM) {
        tracing::debug!(tid = thread.tid, %source, "it is not known whether Landlock restricts the thread");
        return Ok(());
    }
    let reason = format!(
        "its thread {} may not look at other processes of its user: Landlock restricts it, by rules that the kernel shows \
         to nobody",
        thread.tid
    );
    Err(Refusal::process(thread.process.pid, reason, "start the program without its sandbox of Landlock")
        .into())
}

impl Witness {
    fn new(root: i32, user: (u32, u32)) -> Result<Self, CaptureError> {
        let mut arena = guardian::arena()?;
        let mut puppet = in_namespace_of(root, || Ok(limosa_puppet::Resident::bare_child(&mut arena)?))?;
        let pid = puppet.pid();
        // Until it is killed; its change of users makes the kernel forget that it is to end with its parent.
        let seized = ptrace::seize(pid, ptrace::Options::EXIT_KILL);
        let done = seized.map_err(CaptureError::from).and_then(|()| {
            puppet.run(&mut arena, program(user))?;
            Ok(())
        });
        let process = Idle::from(puppet);
        done?;
        let own_pid = ProcDir::open(pid)?.status()?.own_pid();
        Ok(Self { _process: process, own_pid })
    }
}

fn program((uid, gid): (u32, u32)) -> Program {
    let mut program = Program::new();
    let all = [0.into(), u64::from(u32::MAX).into(), 0.into()];
    program.call("close all descriptors", libc::SYS_close_range, all);
    program.call("set groups", libc::SYS_setresgid, [gid.into(), gid.into(), gid.into()]);
    program.call("set users", libc::SYS_setresuid, [uid.into(), uid.into(), uid.into()]);
    let (header, none) = (program.words(&[CAPABILITY_VERSION_3]), program.words(&[0; 3]));
    program.call("drop all capabilities", libc::SYS_capset, [header.into(), none.into()]);
    let arguments = [libc::PR_SET_DUMPABLE.into(), 1.into(), 0.into(), 0.into(), 0.into()];
    program.call("let its user look at it", libc::SYS_prctl, arguments);
    program
}

/// Does `make`, which forks, where children are born into the PID namespace of process `root`.
fn in_namespace_of<T>(root: i32, make: impl FnOnce() -> Result<T, CaptureError>) -> Result<T, CaptureError> {
    let here = ProcDir::open(std::process::id() as i32)?;
    if ProcDir::open(root)?.ns_id(NsKind::Pid)? == here.ns_id(NsKind::Pid)? {
        return make();
    }
    let home = namespace::of_thread(Kind::Pid)?;
    namespace::enter(namespace::of_process(root, Kind::Pid)?, Kind::Pid)?;
    let made = make();
    namespace::enter(home, Kind::Pid)?;
    made
}
