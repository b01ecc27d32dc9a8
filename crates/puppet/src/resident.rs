//! Residents: processes and threads that consist of nothing but the stub and do what the mailbox says.

use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use limosa_kernel::fault;
use limosa_kernel::ptrace::{self, WaitStatus};

use crate::arena::{Arena, ArenaError, Slice};
use crate::program::{Outcome, Program, ProgramError, RenderedProgram};

const MAILBOX: usize = 64;
/// A resident that has not answered for so long is stuck: none of its calls sleeps for long.
const PATIENCE: Duration = Duration::from_mins(1);
/// How long the controller looks at the mailbox before it sleeps: about one wake-up across cores.
const SPIN: Duration = Duration::from_micros(60);

/// Why a resident could not be made or did not answer.
#[derive(Debug, thiserror::Error)]
pub enum ResidentError {
    /// A kernel operation on it failed.
    #[error(transparent)]
    Kernel(#[from] limosa_kernel::Error),
    /// The shared memory could not be had.
    #[error(transparent)]
    Arena(#[from] ArenaError),
    /// A call of its program failed.
    #[error("process {pid}: {source}")]
    Program {
        /// The puppet.
        pid: i32,
        /// Which call and why.
        #[source]
        source: ProgramError,
    },
    /// It could not be started.
    #[error("starting a puppet: {0}")]
    Start(#[source] std::io::Error),
    /// It ended instead of answering.
    #[error(
        "puppet {pid} ended while it was being built ({how}); the kernel ends processes where memory is short, as in a full control \
             group, which its log tells"
    )]
    Died {
        /// The puppet.
        pid: i32,
        /// What was seen of it.
        how: String,
    },
    /// It did not answer in time.
    #[error("puppet {pid} did not answer within {} s", PATIENCE.as_secs())]
    Stuck {
        /// The puppet.
        pid: i32,
    },
}

/// A process or thread under construction that executes programs.
#[derive(Debug)]
pub struct Resident {
    /// Its TID in the controller's PID namespace.
    pid: i32,
    mailbox: Slice,
    region: Slice,
}

/// A program under way in a resident.
#[must_use = "the program's outcome is not known before it is waited for"]
#[derive(Debug)]
pub struct Running {
    command: u32,
    rendered: RenderedProgram,
}

/// A resident that does not exist yet: what its parent's clone3 is to be given.
#[derive(Debug)]
pub struct Birth {
    mailbox: Slice,
    region: Slice,
    running: Running,
}

impl Birth {
    /// Prepares a child that will run `program` first.
    pub fn new(arena: &mut Arena, program: Program) -> Result<Self, ResidentError> {
        let mailbox = arena.allocate(MAILBOX)?;
        let region = arena.allocate(program.size())?;
        let rendered = program.render(region.address);
        arena.write(region, 0, rendered.image());
        arena.word(mailbox, 0).store(1, Ordering::Release);
        Ok(Self { mailbox, region, running: Running { command: 1, rendered } })
    }

    /// Its mailbox, for [`Program::clone3`].
    pub fn mailbox(&self) -> u64 {
        self.mailbox.address
    }

    /// Its first program, for [`Program::clone3`].
    pub fn program(&self) -> u64 {
        self.region.address
    }

    /// The child exists as `pid` (in the controller's PID namespace): the resident, and its first program
    /// under way.
    pub fn born(self, pid: i32) -> (Resident, Running) {
        (Resident { pid, mailbox: self.mailbox, region: self.region }, self.running)
    }
}

impl Resident {
    /// Forks a child of the calling thread into a bare puppet: killed when that thread ends, all signals blocked, no
    /// restartable sequences, nothing mapped but the arena, descriptors untouched.
    pub fn bare_child(arena: &mut Arena) -> Result<Self, ResidentError> {
        let mailbox = arena.allocate(MAILBOX)?;
        fault::point();
        let pid = fork_into(arena.wait_address(), mailbox.address).map_err(ResidentError::Start)?;
        let mut resident = Self { pid, mailbox, region: Slice { address: 0, length: 0 } };
        if let Err(error) = resident.strip(arena) {
            // It is nobody's yet.
            let _ = limosa_kernel::task::signal_process(pid, libc::SIGKILL);
            while let Ok(WaitStatus::Stopped { .. }) = ptrace::wait(pid) {}
            return Err(error);
        }
        Ok(resident)
    }

    /// Leaves nothing of the process that it was forked from but descriptors.
    fn strip(&mut self, arena: &mut Arena) -> Result<(), ResidentError> {
        let pid = self.pid;
        // Attached for a moment, with one stop, to ask where rseq is registered.
        ptrace::seize(pid, ptrace::Options::EXIT_KILL)?;
        ptrace::interrupt(pid)?;
        match ptrace::wait(pid)? {
            WaitStatus::Stopped { .. } => {}
            status => return Err(ResidentError::Died { pid, how: format!("{status:?}") }),
        }
        let rseq = ptrace::rseq_configuration(pid).unwrap_or_default();
        ptrace::detach(pid, 0)?;
        let mut program = Program::new();
        let all = program.words(&[u64::MAX]);
        program.call(
            "block all signals",
            libc::SYS_rt_sigprocmask,
            [libc::SIG_SETMASK.into(), all.into(), 0.into(), 8.into()],
        );
        if rseq.address != 0 {
            const UNREGISTER: i32 = 1;
            program.call(
                "unregister restartable sequences",
                libc::SYS_rseq,
                [rseq.address.into(), rseq.size.into(), UNREGISTER.into(), rseq.signature.into()],
            );
        }
        let (start, end) = (arena.base(), arena.base() + arena.size());
        program.call("unmap everything below the arena", libc::SYS_munmap, [0.into(), start.into()]);
        program.call(
            "unmap everything above the arena",
            libc::SYS_munmap,
            [end.into(), (0x7fff_ffff_f000_u64 - end).into()],
        );
        self.run(arena, program)?;
        Ok(())
    }

    /// Its TID in the controller's PID namespace.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Its TID has become known: until then the caller gave that of another one that ends with it.
    pub fn identify(&mut self, pid: i32) {
        self.pid = pid;
    }

    /// Gives it a program without waiting.
    pub fn start(&mut self, arena: &mut Arena, program: Program) -> Result<Running, ResidentError> {
        fault::point();
        let size = program.size();
        if size > self.region.length {
            self.region = arena.allocate(size.next_power_of_two())?;
        }
        let rendered = program.render(self.region.address);
        arena.write(self.region, 0, rendered.image());
        arena.write(self.mailbox, 8, &self.region.address.to_le_bytes());
        arena.ring(self.mailbox);
        Ok(Running { command: arena.word(self.mailbox, 0).load(Ordering::Relaxed), rendered })
    }

    /// Waits for a program; an error if one of its calls failed that must not.
    pub fn finish(&self, arena: &Arena, running: Running) -> Result<Outcome, ResidentError> {
        self.wait(arena, running.command)?;
        let image = arena.read(self.region, running.rendered.image().len());
        let outcome = running.rendered.outcome(image);
        outcome.check().map_err(|source| ResidentError::Program { pid: self.pid, source })?;
        Ok(outcome)
    }

    /// Whether a program has come to its end.
    pub fn has_finished(&self, arena: &Arena, running: &Running) -> bool {
        arena.word(self.mailbox, 1).load(Ordering::Acquire) == running.command
    }

    /// Runs a program to its end.
    pub fn run(&mut self, arena: &mut Arena, program: Program) -> Result<Outcome, ResidentError> {
        let running = self.start(arena, program)?;
        self.finish(arena, running)
    }

    fn wait(&self, arena: &Arena, command: u32) -> Result<(), ResidentError> {
        let started = Instant::now();
        loop {
            let done = arena.word(self.mailbox, 1).load(Ordering::Acquire);
            if done == command {
                return Ok(());
            }
            if started.elapsed() < SPIN {
                std::thread::yield_now();
                continue;
            }
            arena.sleep_on_done(self.mailbox, done, Duration::from_millis(50));
            if arena.word(self.mailbox, 1).load(Ordering::Acquire) == command {
                return Ok(());
            }
            self.check_alive()?;
            if started.elapsed() > PATIENCE {
                return Err(ResidentError::Stuck { pid: self.pid });
            }
        }
    }

    /// An error if the puppet ended or was stopped by a fault. (A traced puppet that faults stops with the
    /// signal; an untraced one is a zombie of its parent.)
    fn check_alive(&self) -> Result<(), ResidentError> {
        let died = |how: String| Err(ResidentError::Died { pid: self.pid, how });
        match ptrace::try_wait(self.pid) {
            Ok(None) => {}
            Ok(Some(status)) => return died(format!("{status:?}")),
            Err(_) => match std::fs::read_to_string(format!("/proc/{}/stat", self.pid)) {
                Ok(stat) if stat.rsplit(')').next().is_some_and(|rest| !rest.starts_with(" Z")) => {}
                Ok(_) => return died("zombie".into()),
                Err(error) => return died(error.to_string()),
            },
        }
        Ok(())
    }
}

/// clone3(2) like fork(2); the child jumps to `entry` with `r12` = `mailbox` and never returns to Rust. It ends with
/// the calling thread, even if that is killed before it can seize the child.
fn fork_into(entry: u64, mailbox: u64) -> std::io::Result<i32> {
    // The child may be born into another PID namespace, where nobody can tell it who its parent is.
    let parent =
        rustix::process::pidfd_open(rustix::process::getpid(), rustix::process::PidfdFlags::empty())?;
    let poll = libc::pollfd { fd: parent.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let arguments: [u64; 11] = [0, 0, 0, 0, libc::SIGCHLD as u64, 0, 0, 0, 0, 0, 0];
    let result: i64;
    // SAFETY: the parent only gets a number back. The child, which shares no memory with the parent but the
    // arena, executes from here on only these system calls, whose one pointer is to its copy of `poll`, and the stub at
    // `entry`, and touches neither stack nor heap.
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "mov edi, 1", // PR_SET_PDEATHSIG
            "mov esi, 9",
            "mov eax, 157", // prctl
            "syscall",
            // A parent that died before that call sends no signal.
            "mov rdi, r10",
            "mov esi, 1",
            "xor edx, edx",
            "mov eax, 7", // poll
            "syscall",
            "cmp eax, 1",
            "je 3f",
            "mov r12, r8",
            "jmp r9",
            "3: xor edi, edi",
            "mov eax, 60", // exit
            "syscall",
            "ud2",
            "2:",
            in("r8") mailbox,
            in("r9") entry,
            in("r10") &raw const poll,
            inlateout("rax") libc::SYS_clone3 => result,
            in("rdi") arguments.as_ptr(),
            in("rsi") size_of_val(&arguments),
            out("rcx") _,
            out("r11") _,
            out("r12") _,
        );
    }
    if result < 0 { Err(std::io::Error::from_raw_os_error(-result as i32)) } else { Ok(result as i32) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_child_runs_programs_and_forks_another() {
        let mut arena = Arena::new(1 << 26, |_, _| true).unwrap();
        let mut puppet = Resident::bare_child(&mut arena).unwrap();
        let mut program = Program::new();
        let pid = program.call("ask for the process id", libc::SYS_getpid, []);
        let bad = program.try_call("close nothing", libc::SYS_close, [9999.into()]);
        let outcome = puppet.run(&mut arena, program).unwrap();
        assert_eq!(outcome.result(pid).unwrap(), puppet.pid() as u64);
        assert!(outcome.result(bad).is_err());

        let mut first = Program::new();
        let parent = first.call("ask for the parent", libc::SYS_getppid, []);
        let birth = Birth::new(&mut arena, first).unwrap();
        let mut program = Program::new();
        let arguments = program.words(&[0, 0, 0, 0, libc::SIGCHLD as u64, 0, 0, 0, 0, 0, 0]);
        let child = program.clone3("fork", arguments, 88, birth.mailbox(), birth.program());
        let outcome = puppet.run(&mut arena, program).unwrap();
        let (mut child, running) = birth.born(outcome.result(child).unwrap() as i32);
        let outcome = child.finish(&arena, running).unwrap();
        assert_eq!(outcome.result(parent).unwrap(), puppet.pid() as u64);
        let mut program = Program::new();
        program.call("end", libc::SYS_exit_group, [3.into()]);
        let _ = child.start(&mut arena, program).unwrap();
        let mut program = Program::new();
        let status = program.space(8);
        program.call(
            "reap the child",
            libc::SYS_wait4,
            [child.pid().into(), status.into(), 0.into(), 0.into()],
        );
        let outcome = puppet.run(&mut arena, program).unwrap();
        assert_eq!(outcome.word(status, 0), 3 << 8);
        let failing = {
            let mut program = Program::new();
            program.call("close nothing", libc::SYS_close, [9999.into()]);
            puppet.run(&mut arena, program)
        };
        assert!(matches!(failing, Err(ResidentError::Program { .. })), "{failing:?}");
        limosa_kernel::task::signal_process(puppet.pid(), libc::SIGKILL).unwrap();
        assert_eq!(ptrace::wait(puppet.pid()).unwrap(), WaitStatus::Killed(libc::SIGKILL));
    }
}
