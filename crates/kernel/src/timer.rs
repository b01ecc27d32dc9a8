//! What rustix does not know of timer descriptors (timerfd_create(2)).

use std::os::fd::{AsFd, AsRawFd};

use crate::fault;
use crate::{Error, Result};

/// Sets how many expirations of a timerfd nobody has read yet; at least one (`TFD_IOC_SET_TICKS`, which needs
/// `CONFIG_CHECKPOINT_RESTORE`).
pub fn set_ticks(timerfd: impl AsFd, ticks: u64) -> Result<()> {
    const TFD_IOC_SET_TICKS: libc::Ioctl = 0x4008_5400;
    fault::point();
    // SAFETY: the pointer is to a live u64, which the kernel reads.
    let result =
        unsafe { libc::ioctl(timerfd.as_fd().as_raw_fd(), TFD_IOC_SET_TICKS as _, &raw const ticks) };
    if result < 0 {
        return Err(Error::last("ioctl(TFD_IOC_SET_TICKS)", "timerfd"));
    }
    Ok(())
}

/// Arms a timerfd: `flags` are `TFD_TIMER_*`, times are (s, ns). Unlike in rustix, the numbers need no translation.
pub fn arm(timerfd: impl AsFd, flags: u32, value: (i64, i64), interval: (i64, i64)) -> Result<()> {
    fault::point();
    let time = |(tv_sec, tv_nsec)| libc::timespec { tv_sec, tv_nsec };
    let times = libc::itimerspec { it_interval: time(interval), it_value: time(value) };
    // SAFETY: the pointer is to a live itimerspec; the old value is not asked for.
    let result = unsafe {
        libc::timerfd_settime(
            timerfd.as_fd().as_raw_fd(),
            flags as i32,
            &raw const times,
            std::ptr::null_mut(),
        )
    };
    if result < 0 {
        return Err(Error::last("timerfd_settime", "timerfd"));
    }
    Ok(())
}
