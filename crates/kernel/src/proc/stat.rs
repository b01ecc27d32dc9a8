//! `/proc/PID/stat`: one line of numbers, and a name that may contain anything (`proc_pid_stat(5)`).

use super::text::{self, Decimal, ParseError, Parsed};

/// The scheduler's state of a thread, the letter of `stat` and `status` (fs/proc/array.c).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TaskState {
    /// `R`: running or runnable.
    Running,
    /// `S`: interruptible sleep.
    Sleeping,
    /// `D`: uninterruptible sleep.
    DiskSleep,
    /// `T`: stopped by a signal (job control).
    Stopped,
    /// `t`: stopped by its tracer.
    TracingStop,
    /// `Z`: ended, not yet reaped.
    Zombie,
    /// `X` or `x`: being removed.
    Dead,
    /// `P`: parked (kernel threads).
    Parked,
    /// `I`: idle (kernel threads).
    Idle,
    /// A letter this version does not know.
    Other(u8),
}

impl TaskState {
    /// The state that a letter names.
    pub fn from_letter(letter: u8) -> Self {
        match letter {
            b'R' => Self::Running,
            b'S' => Self::Sleeping,
            b'D' => Self::DiskSleep,
            b'T' => Self::Stopped,
            b't' => Self::TracingStop,
            b'Z' => Self::Zombie,
            b'X' | b'x' => Self::Dead,
            b'P' => Self::Parked,
            b'I' => Self::Idle,
            other => Self::Other(other),
        }
    }
}

/// What `/proc/PID/stat` says, as far as a checkpoint needs it. Addresses are 0 without ptrace access.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stat {
    /// Process or thread ID as the reader's PID namespace sees it.
    pub pid: i32,
    /// The name, at most 15 bytes of anything but NUL.
    pub comm: Vec<u8>,
    /// The state.
    pub state: TaskState,
    /// Parent, 0 when it is outside the reader's PID namespace.
    pub ppid: i32,
    /// Process group.
    pub pgrp: i32,
    /// Session.
    pub session: i32,
    /// Controlling terminal's device number as the kernel encodes it; see [`Stat::tty`]. 0: none.
    pub tty_nr: i32,
    /// Foreground process group of the controlling terminal, -1 without one.
    pub tpgid: i32,
    /// `PF_*` flags (include/linux/sched.h).
    pub flags: u32,
    /// Priority as the scheduler counts it: -2…-100 for real-time, 0…39 (nice + 20) otherwise.
    pub priority: i64,
    /// Nice value, 19…-20.
    pub nice: i32,
    /// Threads in the process.
    pub num_threads: u32,
    /// Start since boot (of the reader's time namespace), in clock ticks (`sysconf(_SC_CLK_TCK)`).
    pub start_time: u64,
    /// Resident pages, about.
    pub resident: i64,
    /// Lowest address of program text.
    pub start_code: u64,
    /// End of program text.
    pub end_code: u64,
    /// Bottom (highest address) of the stack at execve.
    pub start_stack: u64,
    /// Signal sent to the parent at exit.
    pub exit_signal: i32,
    /// Real-time priority 1…99, 0 for other policies.
    pub rt_priority: u32,
    /// Scheduling policy, `SCHED_*`.
    pub policy: u32,
    /// Start of initialised and uninitialised data.
    pub start_data: u64,
    /// End of data.
    pub end_data: u64,
    /// Start of the heap that brk grows.
    pub start_brk: u64,
    /// Start of the command line.
    pub arg_start: u64,
    /// End of the command line.
    pub arg_end: u64,
    /// Start of the environment.
    pub env_start: u64,
    /// End of the environment.
    pub env_end: u64,
    /// Exit status as waitpid gives it.
    pub exit_code: i32,
}

impl Stat {
    /// Parses the file. The name ends at the last `)`: only numbers follow it.
    pub fn parse(file: &[u8]) -> Parsed<Self> {
        let bad = |what| ParseError::new(what, file);
        let open = file.iter().position(|&byte| byte == b'(').ok_or_else(|| bad("name"))?;
        let close = file.iter().rposition(|&byte| byte == b')').ok_or_else(|| bad("name"))?;
        let pid = file.get(..open).unwrap_or_default().trim_ascii();
        let comm = file.get(open + 1..close).ok_or_else(|| bad("name"))?;
        let rest: Vec<&[u8]> =
            text::fields(file.get(close + 1..).unwrap_or_default().trim_ascii_end()).collect();
        let fields = Fields(&rest);
        Ok(Self {
            pid: text::decimal(pid, "process ID")?,
            comm: comm.to_vec(),
            state: match fields.raw(3, "state")? {
                [letter] => TaskState::from_letter(*letter),
                other => return Err(ParseError::new("state", other)),
            },
            ppid: fields.number(4, "parent")?,
            pgrp: fields.number(5, "process group")?,
            session: fields.number(6, "session")?,
            tty_nr: fields.number(7, "tty_nr")?,
            tpgid: fields.number(8, "tpgid")?,
            flags: fields.number(9, "flags")?,
            priority: fields.number(18, "priority")?,
            nice: fields.number(19, "nice")?,
            num_threads: fields.number(20, "num_threads")?,
            start_time: fields.number(22, "starttime")?,
            resident: fields.number(24, "rss")?,
            start_code: fields.number(26, "startcode")?,
            end_code: fields.number(27, "endcode")?,
            start_stack: fields.number(28, "startstack")?,
            exit_signal: fields.number(38, "exit_signal")?,
            rt_priority: fields.number(40, "rt_priority")?,
            policy: fields.number(41, "policy")?,
            start_data: fields.number(45, "start_data")?,
            end_data: fields.number(46, "end_data")?,
            start_brk: fields.number(47, "start_brk")?,
            arg_start: fields.number(48, "arg_start")?,
            arg_end: fields.number(49, "arg_end")?,
            env_start: fields.number(50, "env_start")?,
            env_end: fields.number(51, "env_end")?,
            exit_code: fields.number(52, "exit_code")?,
        })
    }

    /// The controlling terminal as (major, minor), if there is one (`new_encode_dev`).
    pub fn tty(&self) -> Option<(u32, u32)> {
        let encoded = self.tty_nr as u32;
        (encoded != 0).then_some(((encoded >> 8) & 0xfff, (encoded & 0xff) | ((encoded >> 12) & 0xfff00)))
    }
}

/// The fields after the name, counted as the manual page does: the state is number 3.
struct Fields<'a>(&'a [&'a [u8]]);

impl<'a> Fields<'a> {
    fn raw(&self, number: usize, what: &'static str) -> Parsed<&'a [u8]> {
        self.0.get(number - 3).copied().ok_or_else(|| ParseError::new(what, b"end of line"))
    }

    fn number<T: Decimal>(&self, number: usize, what: &'static str) -> Parsed<T> {
        text::decimal(self.raw(number, what)?, what)
    }
}
