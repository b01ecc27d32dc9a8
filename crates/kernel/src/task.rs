//! Threads and processes as the kernel sees them: pidfds, kcmp(2), scheduling, robust lists, signals.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use crate::fault;
use crate::{Error, Result};

/// A descriptor for process `pid` (pidfd_open(2)).
pub fn pidfd_open(pid: i32) -> Result<OwnedFd> {
    pidfd_open_with(pid, 0)
}

/// [`pidfd_open`] with `PIDFD_*` flags.
pub fn pidfd_open_with(pid: i32, flags: u32) -> Result<OwnedFd> {
    fault::point();
    // SAFETY: takes numbers only; a result that is not negative is a new descriptor that we own.
    unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, pid, flags);
        if fd < 0 {
            return Err(Error::last("pidfd_open", format_args!("process {pid}")));
        }
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

/// A duplicate, close-on-exec, of descriptor `fd` of the process behind `pidfd` (pidfd_getfd(2)).
pub fn pidfd_getfd(pidfd: impl AsFd, fd: i32) -> Result<OwnedFd> {
    fault::point();
    // SAFETY: takes numbers only; a result that is not negative is a new descriptor that we own.
    unsafe {
        let copy = libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_fd().as_raw_fd(), fd, 0);
        if copy < 0 {
            return Err(Error::last("pidfd_getfd", format_args!("descriptor {fd}")));
        }
        Ok(OwnedFd::from_raw_fd(copy as i32))
    }
}

/// What kcmp(2) can compare of two processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Comparison {
    /// Open file descriptions.
    File = 0,
    /// Address spaces.
    Vm = 1,
    /// Descriptor tables.
    Files = 2,
    /// Working directory, root and umask.
    Fs = 3,
    /// Signal handlers.
    Sighand = 4,
    /// I/O contexts.
    Io = 5,
    /// System V semaphore undo lists.
    Sysvsem = 6,
}

/// How two kernel objects lie in kcmp's (arbitrary but stable) order.
pub fn kcmp(pid1: i32, pid2: i32, what: Comparison, index1: u64, index2: u64) -> Result<std::cmp::Ordering> {
    fault::point();
    // SAFETY: takes numbers only.
    match unsafe { libc::syscall(libc::SYS_kcmp, pid1, pid2, what as i32, index1, index2) } {
        0 => Ok(std::cmp::Ordering::Equal),
        1 => Ok(std::cmp::Ordering::Less),
        2 | 3 => Ok(std::cmp::Ordering::Greater),
        _ => Err(Error::last("kcmp", format_args!("processes {pid1} and {pid2}"))),
    }
}

/// Whether descriptor `number` of process `pid` is the very file that the epoll with descriptor `epoll` of process
/// `owner` watches under the number `watched`; of several entries under that number, the one after `skip` others, in
/// the order of `/proc/PID/fdinfo` (`KCMP_EPOLL_TFD` of kcmp(2)).
pub fn kcmp_epoll(
    (pid, number): (i32, i32),
    (owner, epoll): (i32, i32),
    watched: i32,
    skip: u32,
) -> Result<bool> {
    const KCMP_EPOLL_TFD: i32 = 7;
    fault::point();
    let slot = [epoll as u32, watched as u32, skip];
    // SAFETY: the pointer is to a live struct kcmp_epoll_slot, three 32-bit numbers.
    match unsafe { libc::syscall(libc::SYS_kcmp, pid, owner, KCMP_EPOLL_TFD, number, slot.as_ptr()) } {
        0 => Ok(true),
        1..=3 => Ok(false),
        _ => Err(Error::last("kcmp(KCMP_EPOLL_TFD)", format_args!("processes {pid} and {owner}"))),
    }
}

/// Head address and length of a thread's robust futex list (get_robust_list(2)).
pub fn robust_list(tid: i32) -> Result<(u64, u64)> {
    fault::point();
    let (mut head, mut length) = (0_u64, 0_u64);
    // SAFETY: both pointers are to live u64 values.
    let result = unsafe { libc::syscall(libc::SYS_get_robust_list, tid, &raw mut head, &raw mut length) };
    if result < 0 {
        return Err(Error::last("get_robust_list", format_args!("thread {tid}")));
    }
    Ok((head, length))
}

/// `struct sched_attr`, first published size plus utilization clamps (sched_setattr(2)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct SchedulingAttributes {
    /// Size of this structure, 56.
    pub size: u32,
    /// `SCHED_*`.
    pub policy: u32,
    /// `SCHED_FLAG_*`.
    pub flags: u64,
    /// Nice value of `SCHED_OTHER` and `SCHED_BATCH`.
    pub nice: i32,
    /// Static priority of the real-time policies.
    pub priority: u32,
    /// Deadline policy: nanoseconds; on Linux 6.12 and newer also the slice of fair policies.
    pub runtime: u64,
    /// Deadline policy: nanoseconds.
    pub deadline: u64,
    /// Deadline policy: nanoseconds.
    pub period: u64,
    /// Utilization clamp, lower.
    pub util_min: u32,
    /// Utilization clamp, upper.
    pub util_max: u32,
}

/// A thread's scheduling policy and parameters.
pub fn scheduling(tid: i32) -> Result<SchedulingAttributes> {
    fault::point();
    let mut attributes = SchedulingAttributes::default();
    let size = size_of::<SchedulingAttributes>();
    // SAFETY: the pointer is to a live structure of `size` bytes.
    let result = unsafe { libc::syscall(libc::SYS_sched_getattr, tid, &raw mut attributes, size, 0) };
    if result < 0 {
        return Err(Error::last("sched_getattr", format_args!("thread {tid}")));
    }
    Ok(attributes)
}

/// The processors a thread may run on, 64 in each word.
pub fn affinity(tid: i32) -> Result<Vec<u64>> {
    fault::point();
    let mut mask = vec![0_u64; 128];
    // SAFETY: the buffer is live and `mask.len() * 8` bytes long.
    let bytes = unsafe { libc::syscall(libc::SYS_sched_getaffinity, tid, mask.len() * 8, mask.as_mut_ptr()) };
    if bytes < 0 {
        return Err(Error::last("sched_getaffinity", format_args!("thread {tid}")));
    }
    mask.truncate(bytes as usize / 8);
    while mask.len() > 1 && mask.last() == Some(&0) {
        mask.pop();
    }
    Ok(mask)
}

/// Whether a process can choose the IDs of its POSIX timers (`PR_TIMER_CREATE_RESTORE_IDS`, Linux 6.15).
pub fn timer_ids_can_be_chosen() -> bool {
    const PR_TIMER_CREATE_RESTORE_IDS: i32 = 77;
    const GET: i32 = 2;
    fault::point();
    // SAFETY: takes numbers only.
    unsafe { libc::prctl(PR_TIMER_CREATE_RESTORE_IDS, GET, 0, 0, 0) >= 0 }
}

/// A thread's I/O priority as `ioprio_get(2)` encodes it.
pub fn io_priority(tid: i32) -> Result<u32> {
    const IOPRIO_WHO_PROCESS: i32 = 1;
    fault::point();
    // SAFETY: takes numbers only.
    let result = unsafe { libc::syscall(libc::SYS_ioprio_get, IOPRIO_WHO_PROCESS, tid) };
    if result < 0 {
        return Err(Error::last("ioprio_get", format_args!("thread {tid}")));
    }
    Ok(result as u32)
}

/// Sends `signal` to one thread of a process (tgkill(2)).
pub fn signal_thread(pid: i32, tid: i32, signal: i32) -> Result<()> {
    fault::point();
    // SAFETY: takes numbers only.
    if unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, signal) } < 0 {
        return Err(Error::last("tgkill", format_args!("thread {tid}")));
    }
    Ok(())
}

/// Sends `signal` to a process (kill(2)).
pub fn signal_process(pid: i32, signal: i32) -> Result<()> {
    fault::point();
    // SAFETY: takes numbers only.
    if unsafe { libc::kill(pid, signal) } < 0 {
        return Err(Error::last("kill", format_args!("process {pid}")));
    }
    Ok(())
}

/// Puts a signal with its full `siginfo_t` into the queue of a thread (`rt_tgsigqueueinfo`), or of the
/// whole process if `tid` is `None`. The kernel accepts kernel-made codes (`si_code >= 0`) only from
/// the thread itself.
pub fn queue_signal(pid: i32, tid: Option<i32>, signal: i32, info: &crate::ptrace::RawSiginfo) -> Result<()> {
    fault::point();
    // SAFETY: `info` is 128 live bytes, the size of siginfo_t.
    let result = unsafe {
        match tid {
            Some(tid) => libc::syscall(libc::SYS_rt_tgsigqueueinfo, pid, tid, signal, info.as_ptr()),
            None => libc::syscall(libc::SYS_rt_sigqueueinfo, pid, signal, info.as_ptr()),
        }
    };
    if result < 0 {
        return Err(Error::last("rt_sigqueueinfo", format_args!("process {pid}")));
    }
    Ok(())
}

/// Who gets the signals of a descriptor and which signal: owner type and ID (`F_GETOWN_EX`) and `F_GETSIG`; `None`
/// where no owner is set (fcntl(2)).
pub fn descriptor_owner(descriptor: impl AsFd) -> Option<(i32, i32, i32)> {
    const F_GETOWN_EX: i32 = 16;
    const F_GETSIG: i32 = 11;
    let fd = descriptor.as_fd().as_raw_fd();
    let mut owner = [0_i32; 2];
    // SAFETY: F_GETOWN_EX writes a struct f_owner_ex, two 32-bit numbers, to the live array.
    let result = unsafe { libc::fcntl(fd, F_GETOWN_EX, owner.as_mut_ptr()) };
    if result != 0 || owner[1] == 0 {
        return None;
    }
    // SAFETY: takes numbers only.
    let signal = unsafe { libc::fcntl(fd, F_GETSIG) };
    Some((owner[0], owner[1], signal.max(0)))
}

/// Takes a lock that belongs to an open file description (`F_OFD_SETLK`), without waiting; a `length` of 0 reaches to the end
/// of the file. See `fcntl_locking(2)`.
pub fn lock_description(description: impl AsFd, exclusive: bool, start: u64, length: u64) -> Result<()> {
    const F_OFD_SETLK: i32 = 37;
    crate::fault::point();
    let fd = description.as_fd().as_raw_fd();
    let error = |source| Error::new("fcntl(F_OFD_SETLK)", format_args!("descriptor {fd}"), source);
    let (Ok(l_start), Ok(l_len)) = (i64::try_from(start), i64::try_from(length)) else {
        return Err(error(std::io::Error::from_raw_os_error(libc::EOVERFLOW)));
    };
    let l_type = if exclusive { libc::F_WRLCK } else { libc::F_RDLCK } as libc::c_short;
    let lock = libc::flock { l_type, l_whence: libc::SEEK_SET as libc::c_short, l_start, l_len, l_pid: 0 };
    // SAFETY: F_OFD_SETLK reads a struct flock, which lives until the call returns.
    match unsafe { libc::fcntl(fd, F_OFD_SETLK, &raw const lock) } {
        0 => Ok(()),
        _ => Err(error(std::io::Error::last_os_error())),
    }
}
