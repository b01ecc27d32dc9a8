//! Event counters (eventfd(2)): the count, and whether it is a semaphore.

use std::os::fd::OwnedFd;

use limosa_kernel::eventfd::taken_by_a_read;
use limosa_kernel::proc::FdExtra;
use limosa_puppet::{Arg, Data, Program};
use rustix::event::{EventfdFlags, eventfd};
use serde::{Deserialize, Serialize};

use super::{CaptureContext, DescriptorKind, RebuildContext};
use crate::visits::run_inside;
use crate::error::{CaptureError, RestoreError};
use crate::view::DescriptionView;

/// An eventfd.
#[derive(Debug, Serialize, Deserialize)]
pub struct EventFd {
    /// The counter.
    pub count: u64,
    /// Whether a read takes one instead of all (`EFD_SEMAPHORE`).
    pub semaphore: bool,
}

impl DescriptorKind for EventFd {
    fn recognise(view: &DescriptionView) -> bool {
        view.link == b"anon_inode:[eventfd]"
    }

    fn capture(view: &DescriptionView, _: &mut CaptureContext) -> Result<Self, CaptureError> {
        let eventfd = shown(view)?;
        let semaphore = match eventfd.semaphore {
            Some(semaphore) => semaphore,
            None => find_out(view, eventfd.count)?,
        };
        Ok(Self { count: eventfd.count, semaphore })
    }

    fn examine(view: &DescriptionView, _: &mut CaptureContext) -> Result<(), CaptureError> {
        shown(view).map(drop)
    }

    fn rebuild(&self, _: u32, _: &mut RebuildContext) -> Result<OwnedFd, RestoreError> {
        let kind = if self.semaphore { EventfdFlags::SEMAPHORE } else { EventfdFlags::empty() };
        let fail = |step| RestoreError::rebuild("eventfd", step);
        // Not blocking, so that a count that does not fit is an error and not a restore that hangs.
        let flags = kind | EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let descriptor = eventfd(0, flags).map_err(fail("eventfd2"))?;
        if self.count > 0 {
            rustix::io::write(&descriptor, &self.count.to_ne_bytes()).map_err(fail("write"))?;
        }
        Ok(descriptor)
    }
}

/// What the kernel tells of it.
fn shown(view: &DescriptionView) -> Result<limosa_kernel::proc::EventFd, CaptureError> {
    match &view.info.extra {
        FdExtra::EventFd(eventfd) => Ok(*eventfd),
        _ => {
            let reason = "the kernel does not tell its count";
            Err(view.refuse(reason, "close it before the checkpoint").into())
        }
    }
}

/// `preadv2`: do not wait.
const RWF_NOWAIT: i32 = 8;

/// Whether it is a semaphore, which the kernel keeps to itself before Linux 6.5: a read tells, of a count of two or more.
///
/// The holder itself reads, and puts back what it took, by a program that goes on to its end whatever becomes of Limosa.
/// Of one that is only in flight, Limosa does. Nobody else in the tree runs meanwhile. The same happens whatever it is: nothing in the program depends on it.
///
/// ```text
/// count 0:     write 2, read → 1 or 2, read → 1 or nothing
/// count 1:     write 1, read → 1 or 2, read → 1 or nothing, write 1
/// count 2…:    read → 1 or the count, write what was read
/// ```
fn find_out(view: &DescriptionView, count: u64) -> Result<bool, CaptureError> {
    let read = match view.number() {
        Some(number) => {
            let (program, answer) = question(number, count);
            let outcome = run_inside(view.process, program)?;
            outcome.check().map_err(|source| CaptureError::Question { pid: view.process.pid, source })?;
            outcome.word(answer, 0)
        }
        None => taken_by_a_read(&view.descriptor, count)?,
    };
    match read {
        1 => Ok(true),
        read if read == count.max(2) => Ok(false),
        _ => {
            let reason = "somebody outside of the tree counts in it, and this kernel does not tell whether it is a semaphore";
            Err(view.refuse(reason, "include whoever does, or use Linux 6.5 or newer").into())
        }
    }
}

/// The program, and where what was read first will be.
fn question(number: i32, count: u64) -> (Program, Data) {
    let mut program = Program::new();
    let (first, second) = (program.space(8), program.space(8));
    let read = |program: &mut Program, into: Data| {
        let vector = program.words(&[0, 8]);
        program.point(vector, 0, into);
        // At no position, as read(2) does; a descriptor that blocks must not keep the process waiting.
        let arguments = [number.into(), vector.into(), 1.into(), Arg::from(-1), Arg::from(-1), RWF_NOWAIT.into()];
        program.try_call("read an eventfd", libc::SYS_preadv2, arguments);
    };
    let write = |program: &mut Program, from: Data| {
        let arguments = [number.into(), from.into(), 8.into()];
        program.call("write to an eventfd", libc::SYS_write, arguments);
    };
    if count < 2 {
        let raise = program.words(&[2 - count]);
        write(&mut program, raise);
    }
    read(&mut program, first);
    match count {
        0 => read(&mut program, second),
        1 => {
            read(&mut program, second);
            let one = program.words(&[1]);
            write(&mut program, one);
        }
        _ => write(&mut program, first),
    }
    (program, first)
}
