//! Single system calls in a stopped puppet thread, by ptrace: for what cannot be part of a program.

use limosa_kernel::ptrace;
use limosa_puppet::Arena;

use super::start::await_stop;
use crate::error::RestoreError;

/// A stopped thread of a puppet whose arena is still mapped. Its registers are lost.
pub(crate) struct Inside<'a> {
    tid: i32,
    arena: &'a mut Arena,
}

impl<'a> Inside<'a> {
    /// The stopped thread `tid`.
    pub(crate) fn new(tid: i32, arena: &'a mut Arena) -> Self {
        Self { tid, arena }
    }

    /// Puts `bytes` where the thread can read them; gives their address.
    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> Result<u64, RestoreError> {
        let slice = self.arena.allocate(bytes.len())?;
        self.arena.write(slice, 0, bytes);
        Ok(slice.address)
    }

    /// Has the thread make a system call; gives its result. `step` says in an error what it was for.
    pub(crate) fn call(
        &mut self,
        step: &'static str,
        number: i64,
        arguments: [u64; 6],
    ) -> Result<u64, RestoreError> {
        let result = self.try_call(number, arguments)?;
        if result < 0 {
            let source = std::io::Error::from_raw_os_error(-result as i32);
            return Err(RestoreError::Rebuild { object: format!("thread {}", self.tid), step, source });
        }
        Ok(result as u64)
    }

    /// The same for a call that may fail: its result or the negative error number.
    pub(crate) fn try_call(&mut self, number: i64, arguments: [u64; 6]) -> Result<i64, RestoreError> {
        let mut registers = ptrace::registers(self.tid)?;
        registers.rip = self.arena.syscall_address();
        registers.rax = number as u64;
        registers.orig_rax = u64::MAX;
        [registers.rdi, registers.rsi, registers.rdx, registers.r10, registers.r8, registers.r9] = arguments;
        ptrace::set_registers(self.tid, &registers)?;
        // Entry and exit of the call.
        for _ in 0..2 {
            ptrace::resume_to_syscall(self.tid)?;
            await_stop(self.tid)?;
        }
        Ok(ptrace::registers(self.tid)?.rax as i64)
    }

    /// Lets the thread go to the way back to user mode and stops it there, where the kernel looks at what interrupted
    /// system calls want. To be done after the last call.
    pub(crate) fn park(self) -> Result<(), RestoreError> {
        ptrace::interrupt(self.tid)?;
        ptrace::resume(self.tid, 0)?;
        await_stop(self.tid)?;
        Ok(())
    }
}
