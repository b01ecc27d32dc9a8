//! Probes: whether this kernel does for us what Limosa needs. Each tries the real call, in a way that changes nothing,
//! and gives the kernel's own answer.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::fault;
use crate::ptrace::{self, Options};
use crate::{Error, Result};

/// Fails as the calling thread's `errno` says, if `result` is negative.
fn answer(operation: &'static str, result: i64) -> Result<i64> {
    if result < 0 { Err(Error::last(operation, "the calling process")) } else { Ok(result) }
}

/// clone3(2) with a chosen PID (Linux 5.5; `CAP_CHECKPOINT_RESTORE` or `CAP_SYS_ADMIN`): asks for our own, which
/// is taken, so that no process is made.
pub fn clone_with_pid() -> Result<()> {
    fault::point();
    let set_tid = [std::process::id()];
    // struct clone_args: flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid,
    // set_tid_size, cgroup.
    let mut arguments = [0_u64; 11];
    (arguments[8], arguments[9]) = (set_tid.as_ptr() as u64, 1);
    // SAFETY: the arguments are 88 live bytes that point to one live number. Should a child be made against all
    // expectation, it is a copy of this process and ends at once.
    let result = unsafe { libc::syscall(libc::SYS_clone3, arguments.as_ptr(), size_of_val(&arguments)) };
    match result {
        0 => {
            // SAFETY: ends the calling process, the unexpected child.
            unsafe { libc::_exit(0) }
        }
        1.. => {
            let _ = ptrace::wait(result as i32);
            Ok(())
        }
        _ => match Error::last("clone3(set_tid)", "a process of a chosen ID") {
            taken if taken.errno() == Some(libc::EEXIST) => Ok(()),
            error => Err(error),
        },
    }
}

/// `PR_SET_MM_MAP` (prctl(2); `CONFIG_CHECKPOINT_RESTORE`): asks for the size of its argument.
pub fn set_mm_map() -> Result<()> {
    const PR_SET_MM_MAP_SIZE: libc::c_ulong = 15;
    fault::point();
    let mut size = 0_u32;
    // SAFETY: the kernel writes one 32-bit number to `size`.
    let result = unsafe { libc::prctl(libc::PR_SET_MM, PR_SET_MM_MAP_SIZE, &raw mut size, 0_u64, 0_u64) };
    answer("prctl(PR_SET_MM_MAP_SIZE)", result.into()).map(drop)
}

/// Landlock (landlock_create_ruleset(2)): asks for its version.
pub fn landlock() -> Result<()> {
    const LANDLOCK_CREATE_RULESET_VERSION: u32 = 1;
    fault::point();
    // SAFETY: no rules are read at the null pointer, whose size is 0.
    let result = unsafe {
        let none = std::ptr::null::<u8>();
        libc::syscall(libc::SYS_landlock_create_ruleset, none, 0, LANDLOCK_CREATE_RULESET_VERSION)
    };
    answer("landlock_create_ruleset", result).map(drop)
}

/// `PR_GET_TID_ADDRESS` (prctl(2); `CONFIG_CHECKPOINT_RESTORE`).
pub fn tid_address() -> Result<()> {
    fault::point();
    let mut address = 0_u64;
    // SAFETY: the kernel writes one word to `address`.
    let result = unsafe { libc::prctl(libc::PR_GET_TID_ADDRESS, &raw mut address, 0_u64, 0_u64, 0_u64) };
    answer("prctl(PR_GET_TID_ADDRESS)", result.into()).map(drop)
}

/// `PR_TIMER_CREATE_RESTORE_IDS` (Linux 6.15): asks whether it is on.
pub fn timer_restore_ids() -> Result<()> {
    const PR_TIMER_CREATE_RESTORE_IDS: libc::c_int = 77;
    const GET: libc::c_ulong = 2;
    fault::point();
    // SAFETY: takes numbers only.
    let result = unsafe { libc::prctl(PR_TIMER_CREATE_RESTORE_IDS, GET, 0_u64, 0_u64, 0_u64) };
    answer("prctl(PR_TIMER_CREATE_RESTORE_IDS)", result.into()).map(drop)
}

/// `ARCH_MAP_VDSO_64` (arch_prctl(2); `CONFIG_CHECKPOINT_RESTORE`): our vDSO is mapped already, and the kernel says so.
pub fn map_vdso() -> Result<()> {
    const ARCH_MAP_VDSO_64: i32 = 0x2003;
    const SOMEWHERE: u64 = 0x1000_0000_0000;
    fault::point();
    // SAFETY: takes numbers only; the kernel maps a second vDSO nowhere.
    let result = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_MAP_VDSO_64, SOMEWHERE) };
    match answer("arch_prctl(ARCH_MAP_VDSO_64)", result) {
        Err(error) if error.errno() == Some(libc::EEXIST) => Ok(()),
        other => other.map(drop),
    }
}

/// `MAP_DROPPABLE` (Linux 6.11; mmap(2)): memory that the kernel may drop, for states of random number generators.
pub fn droppable_memory() -> Result<()> {
    const MAP_DROPPABLE: i32 = 0x08;
    fault::point();
    // SAFETY: maps fresh memory that nothing refers to, and unmaps it again.
    unsafe {
        let flags = MAP_DROPPABLE | libc::MAP_ANONYMOUS;
        let at = libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, flags, -1, 0);
        if at == libc::MAP_FAILED {
            return Err(Error::last("mmap(MAP_DROPPABLE)", "the calling process"));
        }
        libc::munmap(at, 4096);
    }
    Ok(())
}

/// The features of userfaultfd(2): the `UFFD_FEATURE_*` bits that this kernel has.
pub fn userfaultfd_features() -> Result<u64> {
    const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
    fault::point();
    // SAFETY: takes a number; a result that is not negative is a new descriptor that we own.
    let descriptor = unsafe {
        let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC);
        if fd < 0 {
            return Err(Error::last("userfaultfd", "the calling process"));
        }
        OwnedFd::from_raw_fd(fd as i32)
    };
    // struct uffdio_api: version, features, ioctls.
    let mut api = [0xaa_u64, 0, 0];
    // SAFETY: the kernel reads and writes 24 bytes of the live array.
    let result = unsafe { libc::ioctl(descriptor.as_raw_fd(), UFFDIO_API, api.as_mut_ptr()) };
    answer("ioctl(UFFDIO_API)", result.into())?;
    Ok(api[1])
}

/// A child that does nothing, is traced by us and stopped. Dropped, it is gone.
#[derive(Debug)]
pub struct Tracee {
    pid: i32,
}

impl Tracee {
    /// Makes one, seized with `options`.
    pub fn new(options: Options) -> Result<Self> {
        fault::point();
        // SAFETY: the child only makes system calls, none of which needs anything that another thread may have held.
        let pid = unsafe { libc::fork() };
        match pid {
            0 => loop {
                // SAFETY: takes numbers only. The child ends with us, whatever becomes of us.
                unsafe {
                    libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                    libc::pause();
                }
            },
            1.. => {
                let tracee = Self { pid };
                ptrace::seize(pid, options)?;
                ptrace::interrupt(pid)?;
                ptrace::wait(pid)?;
                Ok(tracee)
            }
            _ => Err(Error::last("fork", "the calling process")),
        }
    }

    /// Its ID.
    pub fn pid(&self) -> i32 {
        self.pid
    }
}

impl Drop for Tracee {
    fn drop(&mut self) {
        let _ = crate::task::signal_process(self.pid, libc::SIGKILL);
        while let Ok(ptrace::WaitStatus::Stopped { .. }) = ptrace::wait(self.pid) {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tracee_is_stopped_and_leaves_nothing() {
        let tracee = Tracee::new(Options::TRACE_SYSGOOD).expect("ptrace of a child");
        let pid = tracee.pid();
        assert!(ptrace::registers(pid).is_ok());
        drop(tracee);
        assert!(crate::task::pidfd_open(pid).is_err(), "it has been reaped");
    }

    #[test]
    fn choosing_a_pid_makes_no_process() {
        // With or without the privilege.
        if let Err(error) = clone_with_pid() {
            assert!(matches!(error.errno(), Some(libc::EPERM | libc::ENOSYS)), "{error}");
        }
        assert!(rustix::process::wait(rustix::process::WaitOptions::NOHANG).is_err(), "there is no child");
    }
}
