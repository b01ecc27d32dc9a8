//! Classic BPF programs that filter what a socket receives (`SO_ATTACH_FILTER`, `socket(7)`).
//!
//! `getsockopt(SO_GET_FILTER)` gives the program as it was set: the length, in both directions, is a number of instructions
//! of eight bytes. It fails with `EACCES` for an eBPF program, which nothing gives out. Source: `net/core/filter.c`.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `BPF_MAXINSNS`
const MOST: usize = 4096;
/// `sizeof(struct sock_filter)`
const INSTRUCTION: usize = 8;

/// The program; none where there is no filter.
pub(super) fn read(fd: BorrowedFd<'_>) -> io::Result<Option<Vec<u8>>> {
    let count = get(fd, &mut [])?;
    if count == 0 {
        return Ok(None);
    }
    let mut program = vec![0; count.min(MOST) * INSTRUCTION];
    let count = get(fd, &mut program)?;
    program.truncate(count * INSTRUCTION);
    Ok(Some(program))
}

/// The number of instructions, and the program itself where there is room.
fn get(fd: BorrowedFd<'_>, program: &mut [u8]) -> io::Result<usize> {
    let mut count = (program.len() / INSTRUCTION) as libc::socklen_t;
    // SAFETY: the kernel writes at most `count` instructions, which is what fits `program`; with none it writes nothing.
    let answer = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_GET_FILTER,
            program.as_mut_ptr().cast(),
            &raw mut count,
        )
    };
    if answer == 0 { Ok(count as usize) } else { Err(io::Error::last_os_error()) }
}

/// Attaches a program; the kernel checks what it does.
pub(super) fn write(fd: BorrowedFd<'_>, program: &[u8]) -> io::Result<()> {
    let count = program.len() / INSTRUCTION;
    if !program.len().is_multiple_of(INSTRUCTION) || !(1..=MOST).contains(&count) {
        let why = format!("{} bytes are no filter", program.len());
        return Err(io::Error::new(io::ErrorKind::InvalidData, why));
    }
    let program = libc::sock_fprog { len: count as u16, filter: program.as_ptr().cast_mut().cast() };
    // SAFETY: the kernel reads the structure and `count` instructions at its address, and copies them; it asks for no
    // alignment.
    let answer = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
