//! Starting a process in prepared namespaces: a few system calls in the child, a gate, and execve(2).
//!
//! ```text
//! parent                          child (a copy of the calling thread alone)
//! Spawn::start ── clone3 ──────▶  runs its steps in order
//!              ◀──── report ────  "ready", or the step that failed and its errno
//! Held::release ─── gate ──────▶  execve, or exit if there is no program
//!              ◀──── report ────  end of file (it closes on exec), or the errno
//! ```
//! While the child is held it has a PID and is wherever its steps took it, so its parent can write down
//! what it will have to clean up before the program exists. A child whose parent dies at any moment
//! before the release reads end of file at the gate and exits.
//!
//! Between clone and execve the child must not allocate or take locks, since another thread may have held
//! one when it was copied. So a step is plain data prepared in advance, and doing it is system calls only.

use std::ffi::{CStr, CString};
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags};
use rustix::process::{Signal, WaitId, WaitIdOptions};

use crate::fault;
use crate::namespace::Kind;
use crate::{Error, Result};

/// Something that the child does before it is ready.
#[derive(Debug)]
pub enum Step {
    /// Moves itself into the cgroup whose `cgroup.procs` is open for writing behind the descriptor.
    JoinCgroup(OwnedFd),
    /// Enters a namespace (setns(2)).
    Enter(OwnedFd, Kind),
    /// Makes a new namespace and enters it (unshare(2)).
    Unshare(Kind),
    /// Changes the working directory.
    ChangeDirectory(CString),
    /// Mounts a procfs of its own PID namespace at the path.
    MountProc(CString),
    /// Becomes leader of a new session (setsid(2)).
    NewSession,
    /// Joins a new session keyring (keyrings(7)), where the kernel has keys: those of its caller stay behind.
    NewSessionKeyring,
    /// Makes the terminal behind the descriptor the controlling terminal of its session.
    ControllingTerminal(OwnedFd),
    /// Makes `to` a duplicate of `from` that stays open across execve.
    Duplicate {
        /// The descriptor to duplicate.
        from: OwnedFd,
        /// The number the duplicate gets.
        to: RawFd,
    },
    /// Opens `path` in the namespaces the child is in by then, as descriptor `to`.
    Open {
        /// The file to open.
        path: CString,
        /// open(2) flags.
        flags: OFlags,
        /// The number the descriptor gets.
        to: RawFd,
    },
    /// Gives every signal its default action and blocks none; Rust programs ignore `SIGPIPE`, which
    /// execve would pass on.
    ResetSignals,
    /// Sets the file mode creation mask.
    Umask(u32),
    /// Marks all descriptors from 3 on close-on-exec, whatever the caller's caller left open.
    CloseOthersOnExec,
}

/// What the child becomes.
#[derive(Debug)]
pub struct Program {
    /// Paths to try in this order: the name itself, or the name in each directory of a search path.
    candidates: Vec<CString>,
    arguments: Vec<CString>,
    environment: Vec<CString>,
}

impl Program {
    /// The program `arguments[0]`, looked up in the directories of `search_path` (as `PATH` lists them)
    /// if it holds no slash. `environment` is made of `KEY=VALUE`.
    pub fn new(arguments: &[String], environment: &[String], search_path: &str) -> Result<Self> {
        let name = arguments
            .first()
            .ok_or_else(|| Error::malformed("execve", "an empty command", "no program was named"))?;
        let candidates = if name.contains('/') {
            vec![c_string(name)?]
        } else {
            let directories =
                search_path.split(':').map(|directory| if directory.is_empty() { "." } else { directory });
            directories.map(|directory| c_string(&format!("{directory}/{name}"))).collect::<Result<_>>()?
        };
        Ok(Self {
            candidates,
            arguments: arguments.iter().map(|text| c_string(text)).collect::<Result<_>>()?,
            environment: environment.iter().map(|text| c_string(text)).collect::<Result<_>>()?,
        })
    }
}

/// A C string of `text`, which must not contain a zero byte.
pub fn c_string(text: &str) -> Result<CString> {
    CString::new(text)
        .map_err(|_| Error::malformed("execve", format_args!("{text:?}"), "it contains a zero byte"))
}

/// A process to be started.
#[derive(Debug, Default)]
pub struct Spawn {
    /// Whether the child becomes PID 1 of a new PID namespace.
    pub new_pid_namespace: bool,
    /// What it does first, in this order.
    pub steps: Vec<Step>,
    /// What it becomes when released; without one it exits with status 0.
    pub program: Option<Program>,
}

/// What the child writes about itself: which step, and its errno. Two numbers are no steps.
type Report = [u32; 2];
const READY: u32 = u32::MAX;
const EXECVE: u32 = u32::MAX - 1;

impl Spawn {
    /// Starts the child and waits until it has done its steps.
    ///
    /// # Errors
    /// The step that failed; no child is left then.
    pub fn start(self) -> Result<Held> {
        fault::point();
        let pipe = || {
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
                .map_err(|errno| Error::new("pipe2", "the gate of a new process", errno))
        };
        let ((gate_read, gate), (report, report_write)) = (pipe()?, pipe()?);
        let program = self.program.as_ref().map(Pointers::new);
        let child =
            Child { steps: &self.steps, program: program.as_ref(), gate: &gate_read, report: &report_write };
        let (pid, pidfd) = clone(self.new_pid_namespace, &child, gate.as_raw_fd())?;
        drop((gate_read, report_write));
        let held = Held { process: Some(Process { pid, pidfd }), gate, report, name: self.name() };
        match held.read_report()? {
            Some([READY, _]) => Ok(held),
            Some([step, errno]) => {
                let step = self.steps.get(step as usize);
                let (operation, object) = step.map_or(("clone3", String::new()), describe);
                Err(Error::new(operation, object, std::io::Error::from_raw_os_error(errno as i32)))
            }
            None => Err(Error::malformed("clone3", "the new process", "it ended before it was ready")),
        }
    }

    /// Starts the child, and waits for its end: for steps whose effects outlive it.
    pub fn run(self) -> Result<Exit> {
        self.start()?.release()?.wait()
    }

    fn name(&self) -> String {
        self.program
            .as_ref()
            .and_then(|program| program.arguments.first())
            .map_or_else(String::new, |name| name.to_string_lossy().into_owned())
    }
}

/// The operation and the object of a step, for messages.
fn describe(step: &Step) -> (&'static str, String) {
    match step {
        Step::JoinCgroup(_) => ("write", "cgroup.procs of the container's cgroup".to_owned()),
        Step::Enter(_, kind) => ("setns", format!("a {kind} namespace")),
        Step::Unshare(kind) => ("unshare", format!("a new {kind} namespace")),
        Step::ChangeDirectory(path) => ("chdir", path.to_string_lossy().into_owned()),
        Step::MountProc(path) => ("mount", format!("proc onto {}", path.to_string_lossy())),
        Step::NewSession => ("setsid", "the new process".to_owned()),
        Step::NewSessionKeyring => ("keyctl", "a new session keyring".to_owned()),
        Step::ControllingTerminal(_) => ("ioctl(TIOCSCTTY)", "its terminal".to_owned()),
        Step::Duplicate { to, .. } => ("dup3", format!("descriptor {to}")),
        Step::Open { path, .. } => ("open", path.to_string_lossy().into_owned()),
        Step::ResetSignals => ("rt_sigprocmask", "the new process".to_owned()),
        Step::Umask(_) => ("umask", "the new process".to_owned()),
        Step::CloseOthersOnExec => ("close_range", "descriptors from 3 on".to_owned()),
    }
}

/// A child that has done its steps and waits. Dropped, it is killed and reaped.
#[derive(Debug)]
pub struct Held {
    process: Option<Process>,
    gate: OwnedFd,
    report: OwnedFd,
    name: String,
}

impl Held {
    /// Its PID in the caller's PID namespace.
    pub fn pid(&self) -> i32 {
        self.process.as_ref().map_or(0, Process::pid)
    }

    /// Lets the child become its program.
    ///
    /// # Errors
    /// `execve` if no candidate could be executed; no child is left then.
    pub fn release(mut self) -> Result<Process> {
        fault::point();
        rustix::io::write(&self.gate, &[1]).map_err(|errno| Error::new("write", "the gate", errno))?;
        if let Some([_, errno]) = self.read_report()? {
            let cause = std::io::Error::from_raw_os_error(errno as i32);
            return Err(Error::new("execve", format_args!("{:?}", self.name), cause));
        }
        self.process.take().ok_or_else(|| Error::malformed("clone3", &self.name, "released twice"))
    }

    fn read_report(&self) -> Result<Option<Report>> {
        let object = || format!("the report of process {}", self.pid());
        let mut bytes = [0_u8; size_of::<Report>()];
        let mut file = std::fs::File::from(
            self.report.try_clone().map_err(|source| Error::new("dup", object(), source))?,
        );
        match file.read(&mut bytes) {
            Ok(0) => Ok(None),
            Ok(length) if length == bytes.len() => {
                let bytes = u64::from_ne_bytes(bytes);
                Ok(Some([(bytes >> 32) as u32, bytes as u32]))
            }
            Ok(_) => Err(Error::malformed("read", object(), "a torn report")),
            Err(source) => Err(Error::new("read", object(), source)),
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(process) = &self.process {
            let _ = process.signal(Signal::KILL);
            let _ = process.wait();
        }
    }
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It exited with this status.
    Status(i32),
    /// It was killed by this signal.
    Signal(i32),
}

impl Exit {
    /// The number a shell gives it: the status, or 128 and the signal.
    pub fn code(self) -> u8 {
        match self {
            Self::Status(status) => status as u8,
            Self::Signal(signal) => 128_u8.wrapping_add(signal as u8),
        }
    }
}

/// A running child. Dropping it leaves the process alone.
#[derive(Debug)]
pub struct Process {
    pid: i32,
    pidfd: OwnedFd,
}

impl Process {
    /// Its PID in the caller's PID namespace.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        fault::point();
        rustix::process::pidfd_send_signal(&self.pidfd, signal)
            .map_err(|errno| Error::new("pidfd_send_signal", format_args!("process {}", self.pid), errno))
    }

    /// Waits for its end, and reaps it.
    pub fn wait(&self) -> Result<Exit> {
        let error = |errno| Error::new("waitid", format_args!("process {}", self.pid), errno);
        let id = WaitId::PidFd(self.pidfd.as_fd());
        let status = rustix::io::retry_on_intr(|| rustix::process::waitid(id.clone(), WaitIdOptions::EXITED));
        let status = status.map_err(error)?.ok_or_else(|| error(Errno::CHILD))?;
        Ok(status
            .exit_status()
            .map_or_else(|| Exit::Signal(status.terminating_signal().unwrap_or(0)), Exit::Status))
    }

    /// Waits at most `timeout` for its end, without reaping it: whether it has ended.
    pub fn wait_timeout(&self, timeout: Duration) -> Result<bool> {
        wait_for_end(&self.pidfd, timeout)
    }
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// Waits at most `timeout` until the process behind `pidfd`, anyone's child, has ended: whether it has.
pub fn wait_for_end(pidfd: impl AsFd, timeout: Duration) -> Result<bool> {
    let deadline = Instant::now() + timeout;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left =
            rustix::event::Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        match rustix::event::poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&left)) {
            Ok(count) => return Ok(count > 0),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(Error::new("poll", "a pidfd", errno)),
        }
    }
}

/// The null-terminated arrays that execve wants, pointing into a [`Program`].
struct Pointers<'a> {
    candidates: &'a [CString],
    arguments: Vec<*const libc::c_char>,
    environment: Vec<*const libc::c_char>,
}

impl<'a> Pointers<'a> {
    fn new(program: &'a Program) -> Self {
        let terminated = |strings: &[CString]| {
            strings.iter().map(|text| text.as_ptr()).chain([std::ptr::null()]).collect()
        };
        Self {
            candidates: &program.candidates,
            arguments: terminated(&program.arguments),
            environment: terminated(&program.environment),
        }
    }
}

/// What the child works on.
struct Child<'a> {
    steps: &'a [Step],
    program: Option<&'a Pointers<'a>>,
    gate: &'a OwnedFd,
    report: &'a OwnedFd,
}

/// clone3(2) with the semantics of fork(2); the child runs `child` and never returns. It closes
/// `parents_gate`, its copy of the end that only the parent may hold.
fn clone(new_pid_namespace: bool, child: &Child<'_>, parents_gate: RawFd) -> Result<(i32, OwnedFd)> {
    let mut pidfd: RawFd = -1;
    let mut flags = libc::CLONE_PIDFD as u64;
    if new_pid_namespace {
        flags |= libc::CLONE_NEWPID as u64;
    }
    // SAFETY: clone_args is plain numbers, for which zero is valid.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = flags;
    arguments.pidfd = (&raw mut pidfd) as u64;
    arguments.exit_signal = libc::SIGCHLD as u64;
    // SAFETY: the structure is live and of the given size, `pidfd` takes the descriptor. Without CLONE_VM
    // the child has a copy of this memory, and goes on to `Child::run`, which does system calls only.
    match unsafe { libc::syscall(libc::SYS_clone3, &raw mut arguments, size_of::<libc::clone_args>()) } {
        0 => {
            // SAFETY: in the child nothing else uses this copy of the parent's descriptor.
            unsafe { libc::close(parents_gate) };
            child.run()
        }
        // SAFETY: CLONE_PIDFD has put a new descriptor there, which we own.
        pid @ 1.. => Ok((pid as i32, unsafe { OwnedFd::from_raw_fd(pidfd) })),
        _ => Err(Error::last("clone3", "a new process")),
    }
}

impl Child<'_> {
    fn run(&self) -> ! {
        for (number, step) in self.steps.iter().enumerate() {
            if let Err(errno) = perform(step) {
                self.report([number as u32, errno.raw_os_error() as u32]);
                exit(127);
            }
        }
        self.report([READY, 0]);
        let mut byte = [0_u8; 1];
        if !matches!(rustix::io::retry_on_intr(|| rustix::io::read(self.gate, &mut byte)), Ok(1)) {
            exit(127);
        }
        let Some(program) = self.program else { exit(0) };
        self.report([EXECVE, execve(program).raw_os_error() as u32]);
        exit(127)
    }

    fn report(&self, report: Report) {
        let [step, errno] = report.map(u64::from);
        let _ = rustix::io::write(self.report, &(step << 32 | errno).to_ne_bytes());
    }
}

fn exit(status: i32) -> ! {
    // SAFETY: ends the process without running anything of it.
    unsafe { libc::_exit(status) }
}

/// Tries the candidates as execvp(3) does: a file that may not be executed does not end the search, but
/// decides what is reported if nothing else is found.
fn execve(program: &Pointers<'_>) -> Errno {
    let mut answer = Errno::NOENT;
    for path in program.candidates {
        // SAFETY: all strings are terminated and live, both arrays end with a null pointer.
        unsafe { libc::execve(path.as_ptr(), program.arguments.as_ptr(), program.environment.as_ptr()) };
        match Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::NOEXEC) {
            Errno::NOENT | Errno::NOTDIR => {}
            Errno::ACCESS => answer = Errno::ACCESS,
            errno => return errno,
        }
    }
    answer
}

fn perform(step: &Step) -> rustix::io::Result<()> {
    match step {
        Step::JoinCgroup(procs) => rustix::io::write(procs, b"0").map(drop),
        Step::Enter(namespace, kind) => {
            rustix::thread::move_into_link_name_space(namespace.as_fd(), Some(kind.link_type()))
        }
        // SAFETY: the flag is one of CLONE_NEW*, never CLONE_FILES.
        Step::Unshare(kind) => unsafe { rustix::thread::unshare_unsafe(kind.unshare_flag()) },
        Step::ChangeDirectory(path) => rustix::process::chdir(path.as_c_str()),
        Step::MountProc(path) => mount_proc(path),
        Step::NewSession => rustix::process::setsid().map(drop),
        Step::NewSessionKeyring => {
            const JOIN_SESSION_KEYRING: libc::c_long = 1;
            // SAFETY: no name is read at the null pointer.
            match unsafe { libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, 0_usize) } {
                0.. => Ok(()),
                _ => match last_errno() {
                    Errno::NOSYS => Ok(()),
                    errno => Err(errno),
                },
            }
        }
        Step::ControllingTerminal(terminal) => rustix::process::ioctl_tiocsctty(terminal),
        Step::Duplicate { from, to } => duplicate(from.as_raw_fd(), *to),
        Step::Open { path, flags, to } => {
            let file = rustix::fs::openat(CWD, path.as_c_str(), *flags | OFlags::CLOEXEC, Mode::empty())?;
            duplicate(file.as_raw_fd(), *to)
        }
        Step::ResetSignals => {
            reset_signals();
            Ok(())
        }
        Step::Umask(mask) => {
            rustix::process::umask(Mode::from_raw_mode(*mask));
            Ok(())
        }
        Step::CloseOthersOnExec => {
            // SAFETY: takes numbers only, and marks descriptors without closing any now.
            match unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) } {
                0 => Ok(()),
                _ => Err(last_errno()),
            }
        }
    }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL)
}

fn duplicate(from: RawFd, to: RawFd) -> rustix::io::Result<()> {
    // SAFETY: takes numbers only. The child owns its descriptor table and `to` is none of those it needs.
    if unsafe { libc::dup2(from, to) } < 0 { Err(last_errno()) } else { Ok(()) }
}

fn reset_signals() {
    for signal in 1..=64 {
        // SAFETY: SIG_DFL is no pointer; the child has no other thread. SIGKILL, SIGSTOP and those that the
        // C library keeps for itself are refused, and are at their default anyway.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    let none = 0_u64;
    // SAFETY: the kernel's signal set is eight bytes, which are live.
    unsafe {
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const none, 0, size_of::<u64>())
    };
}

fn mount_proc(path: &CStr) -> rustix::io::Result<()> {
    let context = rustix::mount::fsopen(c"proc", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_create(context.as_fd())?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let mount = rustix::mount::fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    rustix::mount::move_mount(&mount, c"", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
}
