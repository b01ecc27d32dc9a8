//! Terminals and pseudo-terminals: the requests of ioctl(2) (`ioctl_tty(2)`, drivers/tty in the kernel).

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use crate::fault;
use crate::guarded;
use crate::{Error, Result};

// Requests that the C library's headers lack, or have under a type of their own.
const TCGETS2: u64 = 0x802C_542A;
const TCSETS2: u64 = 0x402C_542B;
const TIOCGPTN: u64 = 0x8004_5430;
const TIOCSPTLCK: u64 = 0x4004_5431;
const TIOCGDEV: u64 = 0x8004_5432;
const TIOCGPKT: u64 = 0x8004_5438;
const TIOCGPTLCK: u64 = 0x8004_5439;
const TIOCGEXCL: u64 = 0x8004_5440;
const TIOCGPTPEER: u64 = 0x5441;

/// Bytes that a terminal keeps for whoever reads it (`N_TTY_BUF_SIZE`, less one): what is beyond waits elsewhere.
pub const QUEUE: usize = 4095;

/// `struct termios2`: the settings of a terminal (`termios(3)`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Settings {
    /// `c_iflag`
    pub input: u32,
    /// `c_oflag`
    pub output: u32,
    /// `c_cflag`
    pub control: u32,
    /// `c_lflag`
    pub local: u32,
    /// The line discipline.
    pub line: u8,
    /// `c_cc`
    pub characters: [u8; 19],
    /// Bits per second, in.
    pub input_speed: u32,
    /// Bits per second, out.
    pub output_speed: u32,
}

/// `struct winsize`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Size {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
    /// Pixels.
    pub width: u16,
    /// Pixels.
    pub height: u16,
}

fn request<T>(fd: impl AsFd, name: &'static str, request: u64, value: &mut T) -> Result<()> {
    fault::point();
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: every caller passes the type that the request reads or writes, live and exclusively borrowed.
    if unsafe { libc::ioctl(fd, request, std::ptr::from_mut(value)) } < 0 {
        return Err(Error::last(name, format_args!("descriptor {fd}")));
    }
    Ok(())
}

fn number(fd: impl AsFd, name: &'static str, code: u64) -> Result<i32> {
    let mut value = 0_i32;
    request(fd, name, code, &mut value)?;
    Ok(value)
}

/// The settings; asked of a pseudo-terminal's master, those of its slave.
pub fn settings(terminal: impl AsFd) -> Result<Settings> {
    let mut settings = Settings::default();
    request(terminal, "ioctl(TCGETS2)", TCGETS2, &mut settings)?;
    Ok(settings)
}

/// Changes the settings at once.
pub fn set_settings(terminal: impl AsFd, mut settings: Settings) -> Result<()> {
    request(terminal, "ioctl(TCSETS2)", TCSETS2, &mut settings)
}

/// The size of the window.
pub fn size(terminal: impl AsFd) -> Result<Size> {
    let mut size = Size::default();
    request(terminal, "ioctl(TIOCGWINSZ)", libc::TIOCGWINSZ, &mut size)?;
    Ok(size)
}

/// Changes the size of the window; the foreground group hears of it.
pub fn set_size(terminal: impl AsFd, mut size: Size) -> Result<()> {
    request(terminal, "ioctl(TIOCSWINSZ)", libc::TIOCSWINSZ, &mut size)
}

/// The N of a master's `/dev/pts/N`.
pub fn index(master: impl AsFd) -> Result<u32> {
    Ok(number(master, "ioctl(TIOCGPTN)", TIOCGPTN)? as u32)
}

/// Whether a master's slave cannot be opened yet.
pub fn is_locked(master: impl AsFd) -> Result<bool> {
    Ok(number(master, "ioctl(TIOCGPTLCK)", TIOCGPTLCK)? != 0)
}

/// Locks or unlocks a master's slave.
pub fn set_locked(master: impl AsFd, locked: bool) -> Result<()> {
    request(master, "ioctl(TIOCSPTLCK)", TIOCSPTLCK, &mut i32::from(locked))
}

/// Whether a master is in packet mode (`ioctl_tty(2)`, `TIOCPKT`).
pub fn packet_mode(master: impl AsFd) -> Result<bool> {
    Ok(number(master, "ioctl(TIOCGPKT)", TIOCGPKT)? != 0)
}

/// Turns a master's packet mode on or off.
pub fn set_packet_mode(master: impl AsFd, on: bool) -> Result<()> {
    request(master, "ioctl(TIOCPKT)", libc::TIOCPKT, &mut i32::from(on))
}

/// Whether only root may open the terminal again (`TIOCEXCL`).
pub fn is_exclusive(terminal: impl AsFd) -> Result<bool> {
    Ok(number(terminal, "ioctl(TIOCGEXCL)", TIOCGEXCL)? != 0)
}

/// Lets only root open the terminal again.
pub fn set_exclusive(terminal: impl AsFd) -> Result<()> {
    fault::point();
    let fd = terminal.as_fd().as_raw_fd();
    // SAFETY: takes no argument.
    if unsafe { libc::ioctl(fd, libc::TIOCEXCL) } < 0 {
        return Err(Error::last("ioctl(TIOCEXCL)", format_args!("descriptor {fd}")));
    }
    Ok(())
}

/// The terminal behind a descriptor, also behind `/dev/tty`, as (major, minor); of a master, its slave.
pub fn device(terminal: impl AsFd) -> Result<(u32, u32)> {
    let encoded = number(terminal, "ioctl(TIOCGDEV)", TIOCGDEV)? as u32;
    Ok((encoded >> 8 & 0xfff, encoded & 0xff | encoded >> 12 & 0xf_ff00))
}

/// Opens the slave of a master that is not locked, with `O_*` flags, wherever its `/dev/pts` is mounted. The descriptor
/// is closed on exec.
pub fn open_slave(master: impl AsFd, flags: i32) -> Result<OwnedFd> {
    fault::point();
    let fd = master.as_fd().as_raw_fd();
    // `ptm_open_peer` in drivers/tty/pty.c leaves O_CLOEXEC in the flags of the open file description, where
    // /proc/PID/fdinfo shows it for every duplicate, closed on exec or not. So it is set on the descriptor afterwards.
    // SAFETY: takes numbers only; a result that is not negative is a new descriptor that we own.
    let slave = unsafe {
        let slave = libc::ioctl(fd, TIOCGPTPEER, flags & !libc::O_CLOEXEC);
        if slave < 0 {
            return Err(Error::last("ioctl(TIOCGPTPEER)", format_args!("descriptor {fd}")));
        }
        OwnedFd::from_raw_fd(slave)
    };
    rustix::io::fcntl_setfd(&slave, rustix::io::FdFlags::CLOEXEC).map_err(|errno| {
        Error::new("fcntl(F_SETFD)", format_args!("descriptor {}", slave.as_raw_fd()), errno)
    })?;
    Ok(slave)
}

/// How many bytes could be read now.
pub fn waiting(terminal: impl AsFd) -> Result<usize> {
    Ok(number(terminal, "ioctl(FIONREAD)", libc::FIONREAD)?.max(0) as usize)
}

/// Puts bytes where whoever reads the terminal finds them, behind what is there (`TIOCSTI`).
pub fn put_in(terminal: impl AsFd, bytes: &[u8]) -> Result<()> {
    fault::point();
    let fd = terminal.as_fd().as_raw_fd();
    for byte in bytes {
        // SAFETY: the request reads one byte, which is live.
        if unsafe { libc::ioctl(fd, libc::TIOCSTI, std::ptr::from_ref(byte)) } < 0 {
            return Err(Error::last("ioctl(TIOCSTI)", format_args!("descriptor {fd}")));
        }
    }
    Ok(())
}

/// A copy of what a master could read now, at most [`QUEUE`] bytes, which stay where they are.
///
/// The kernel has no way to look at them, so they are read and put back, by a helper that a `kill -9` of this
/// process does not end. Nobody else may read meanwhile. In packet mode a status that waits would be lost: the
/// caller must have looked (`POLLPRI`).
pub fn copy_waiting(master: impl AsFd) -> Result<Vec<u8>> {
    fault::point();
    let master = master.as_fd();
    let count = waiting(master)?.min(QUEUE);
    if count == 0 {
        return Ok(Vec::new());
    }
    let (fd, skipped) = (master.as_raw_fd(), usize::from(packet_mode(master)?));
    let mut buffer = vec![0_u8; count + skipped];
    let (mut got, mut failure) = (0, 0);
    let finished = guarded::run(|_| {
        // SAFETY: the buffer is live and as long as said; TIOCSTI reads one byte of it at a time.
        unsafe {
            let read = libc::read(fd, buffer.as_mut_ptr().cast(), buffer.len());
            if read < 0 {
                failure = *libc::__errno_location();
                return;
            }
            got = (read as usize).min(buffer.len());
            for at in skipped..got {
                if libc::ioctl(fd, libc::TIOCSTI, buffer.as_ptr().add(at)) < 0 {
                    failure = *libc::__errno_location();
                }
            }
        }
    });
    let object = || format!("the queue of descriptor {fd}");
    match finished {
        Ok(true) if failure == 0 => Ok(buffer.get(skipped..got).unwrap_or_default().to_vec()),
        Ok(true) => Err(Error::new("read", object(), io::Error::from_raw_os_error(failure))),
        Ok(false) => Err(Error::malformed("read", object(), "the helper that copies it was killed")),
        Err(source) => Err(Error::new("clone", object(), source)),
    }
}

#[cfg(test)]
mod tests {
    use rustix::pty::{OpenptFlags, openpt};

    use super::*;

    #[test]
    fn what_waits_is_copied_and_stays() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        set_locked(&master, false).unwrap();
        let slave = open_slave(&master, libc::O_RDWR | libc::O_NOCTTY).unwrap();
        let device = device(&slave).unwrap();
        assert_eq!(device, (136, index(&master).unwrap()));
        for packets in [false, true] {
            set_packet_mode(&master, packets).unwrap();
            rustix::io::write(&slave, b"shown\n").unwrap();
            let started = std::time::Instant::now();
            while waiting(&master).unwrap() < 7 && started.elapsed().as_secs() < 5 {}
            for _ in 0..2 {
                assert_eq!(copy_waiting(&master).unwrap(), b"shown\r\n");
            }
            let mut buffer = [0; 100];
            let got = rustix::io::read(&master, &mut buffer).unwrap();
            assert_eq!(buffer[usize::from(packets)..got], *b"shown\r\n");
        }
        let mut changed = settings(&master).unwrap();
        changed.local ^= libc::ECHO;
        set_settings(&master, changed).unwrap();
        assert_eq!(settings(&slave).unwrap(), changed);
    }
}
