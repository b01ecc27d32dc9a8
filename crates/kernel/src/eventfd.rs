//! What the kernel does not tell of an eventfd (`eventfd(2)`) before Linux 6.5.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use crate::{Error, Result, guarded};

/// `preadv2(2)`: do not wait.
const RWF_NOWAIT: i32 = 8;

/// What a read gives of an eventfd with this count, raised to two if it is less: 1 of a semaphore, else the whole. What is read
/// is put back, by the helper of `guarded`; nobody else may count meanwhile.
///
/// ```text
/// count 0:     write 2, read → 1 or 2, read → 1 or nothing
/// count 1:     write 1, read → 1 or 2, read → 1 or nothing, write 1
/// count 2…:    read → 1 or the count, write what was read
/// ```
pub fn taken_by_a_read(eventfd: impl AsFd, count: u64) -> Result<u64> {
    crate::fault::point();
    let fd = eventfd.as_fd().as_raw_fd();
    let mut outcome = Ok(0);
    let finished = guarded::run(|_| outcome = take_and_put_back(fd, count))
        .map_err(|source| Error::new("clone(CLONE_VM)", "the helper that reads an eventfd", source))?;
    if !finished {
        return Err(Error::malformed("read", format_args!("eventfd {fd}"), "the helper was killed"));
    }
    outcome.map_err(|source| Error::new("read and write", format_args!("eventfd {fd}"), source))
}

/// In the helper. Allocates nothing.
fn take_and_put_back(fd: i32, count: u64) -> io::Result<u64> {
    if count < 2 {
        write(fd, 2 - count)?;
    }
    let first = read(fd)?;
    match count {
        // Of a semaphore there is another one; else nothing.
        0 | 1 => {
            let _ = read(fd);
        }
        _ => write(fd, first)?,
    }
    if count == 1 {
        write(fd, 1)?;
    }
    Ok(first)
}

fn write(fd: i32, value: u64) -> io::Result<()> {
    // SAFETY: the kernel reads the eight bytes of `value`.
    match unsafe { libc::write(fd, (&raw const value).cast(), 8) } {
        8 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn read(fd: i32) -> io::Result<u64> {
    let mut value = 0_u64;
    let vector = libc::iovec { iov_base: (&raw mut value).cast(), iov_len: 8 };
    // SAFETY: the kernel writes at most eight bytes at `value`, at the position -1: none, as in read(2).
    match unsafe { libc::preadv2(fd, &raw const vector, 1, -1, RWF_NOWAIT) } {
        8 => Ok(value),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    #[test]
    fn a_semaphore_is_told_from_a_counter_and_both_keep_their_count() {
        for count in [0_u64, 1, 2, 3, 1 << 40] {
            for (flags, wanted) in [(EventfdFlags::empty(), count.max(2)), (EventfdFlags::SEMAPHORE, 1)] {
                // It blocks.
                let eventfd = eventfd(0, flags).unwrap();
                if count > 0 {
                    rustix::io::write(&eventfd, &count.to_ne_bytes()).unwrap();
                }
                assert_eq!(taken_by_a_read(&eventfd, count).unwrap(), wanted);
                let info =
                    std::fs::read_to_string(format!("/proc/self/fdinfo/{}", eventfd.as_raw_fd())).unwrap();
                assert!(info.contains(&format!("eventfd-count: {count:16x}")), "{count}: {info}");
            }
        }
    }
}
