//! Functions of the vDSO, called through pointers that were looked up once, as the C library does.
//!
//! Without options they are the C library's own, and two threads call `clock_gettime` all the time, so that a freeze
//! finds them inside. With `FILE NAME=OFFSET…` the vDSO is the image in the file, mapped as the kernel does it: its code
//! behind four pages of data, which say that there is no clock to be read without a system call (zeros). Then the
//! functions are called only while the state is checked. With `changed` the process overwrites a byte of its own vDSO.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};

use super::{Setting, Verify};
use crate::sys::{self, Region};

const PAGE: usize = 4096;
const DATA: usize = 4 * PAGE;
/// How long a check calls `clock_gettime`.
const CHECKED: Duration = Duration::from_millis(20);
/// How long a thread may stand still on a busy machine.
const PATIENCE: Duration = Duration::from_secs(10);

type ClockCall = unsafe extern "C" fn(libc::clockid_t, *mut libc::timespec) -> libc::c_int;
type TimeOfDay = unsafe extern "C" fn(*mut libc::timeval, *mut libc::c_void) -> libc::c_int;
type Time = unsafe extern "C" fn(*mut libc::time_t) -> libc::time_t;
type GetCpu = unsafe extern "C" fn(*mut u32, *mut u32, *mut libc::c_void) -> libc::c_int;

/// What was looked up.
#[derive(Clone, Copy)]
struct Functions {
    clock_gettime: ClockCall,
    clock_getres: Option<ClockCall>,
    gettimeofday: Option<TimeOfDay>,
    time: Option<Time>,
    getcpu: Option<GetCpu>,
}

pub fn set_up(setting: &Setting) -> Result<Box<Verify>> {
    let Some((file, offsets)) = setting.options.split_first() else {
        return Ok(all_the_time(Functions::OF_THE_LIBRARY));
    };
    if file == "changed" {
        change()?;
        return Ok(all_the_time(Functions::OF_THE_LIBRARY));
    }
    let image = std::fs::read(file).with_context(|| format!("reading {file}"))?;
    let mut whole = Region::anonymous(DATA + image.len().next_multiple_of(PAGE))?;
    whole.bytes_mut()[DATA..][..image.len()].copy_from_slice(&image);
    whole.part(0, DATA).protect(libc::PROT_READ)?;
    let code = whole.part(DATA, image.len().next_multiple_of(PAGE));
    code.protect(libc::PROT_READ | libc::PROT_EXEC)?;
    let address = |name: &str| {
        let offset = offsets.iter().find_map(|option| option.strip_prefix(name)?.strip_prefix('='));
        let offset = usize::from_str_radix(offset?, 16).ok().filter(|offset| *offset < image.len())?;
        Some(code.address() + offset)
    };
    // SAFETY: the one who started this says that functions of these names, and so of these types, are there; the
    // region is never unmapped.
    let functions = unsafe {
        Functions {
            clock_gettime: std::mem::transmute::<usize, ClockCall>(
                address("clock_gettime").context("no clock_gettime")?,
            ),
            clock_getres: address("clock_getres").map(|at| std::mem::transmute::<usize, ClockCall>(at)),
            gettimeofday: address("gettimeofday").map(|at| std::mem::transmute::<usize, TimeOfDay>(at)),
            time: address("time").map(|at| std::mem::transmute::<usize, Time>(at)),
            getcpu: address("getcpu").map(|at| std::mem::transmute::<usize, GetCpu>(at)),
        }
    };
    let mut last = 0;
    Ok(Box::new(move || {
        let until = Instant::now() + CHECKED;
        while Instant::now() < until {
            last = later(functions, last)?;
        }
        functions.check()?;
        Ok(String::new())
    }))
}

/// Overwrites a byte of the vDSO that nobody reads, in the padding of its ELF identification.
fn change() -> Result<()> {
    use std::os::unix::fs::FileExt;
    // SAFETY: takes a number.
    let start = unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) };
    let memory = std::fs::OpenOptions::new().write(true).open("/proc/self/mem")?;
    memory.write_all_at(&[1], start + 12).context("writing to the vDSO")
}

/// A thread that calls `clock_gettime` as long as the process lives.
#[derive(Default)]
struct Caller {
    calls: AtomicU64,
    failed: OnceLock<String>,
}

/// Such threads, and the check that they go on.
fn all_the_time(functions: Functions) -> Box<Verify> {
    let callers: Vec<Arc<Caller>> = (0..2).map(|_| Arc::default()).collect();
    for caller in callers.iter().cloned() {
        std::thread::spawn(move || {
            let mut last = 0;
            loop {
                match later(functions, last) {
                    Ok(now) => last = now,
                    Err(error) => return caller.failed.set(error.to_string()),
                }
                caller.calls.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    Box::new(move || {
        for caller in &callers {
            let (before, deadline) = (caller.calls.load(Ordering::Relaxed), Instant::now() + PATIENCE);
            while caller.calls.load(Ordering::Relaxed) < before + 1000 {
                if let Some(why) = caller.failed.get() {
                    bail!("in a thread: {why}");
                }
                ensure!(Instant::now() < deadline, "a thread stands still");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        functions.check()?;
        Ok(String::new())
    })
}

/// The monotonic time in nanoseconds, which must not be before `last`.
fn later(functions: Functions, last: u64) -> Result<u64> {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes the time to `now`.
    let result = unsafe { (functions.clock_gettime)(libc::CLOCK_MONOTONIC, &raw mut now) };
    ensure!(result == 0, "clock_gettime gives {result}");
    let now = now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64;
    ensure!(now >= last, "the monotonic clock went from {last} back to {now}");
    Ok(now)
}

impl Functions {
    /// What programs call, and what leads to the vDSO.
    const OF_THE_LIBRARY: Self = Self {
        clock_gettime: libc::clock_gettime,
        clock_getres: Some(libc::clock_getres),
        gettimeofday: None,
        time: Some(libc::time),
        getcpu: None,
    };

    /// Calls each once, and compares what it says with what the kernel says.
    fn check(self) -> Result<()> {
        let real = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let is_now = |what: &str, seconds: i64| {
            ensure!((seconds as u64).abs_diff(real) <= 1, "{what} says {seconds}, the clock {real}");
            Ok(())
        };
        let monotonic = later(self, 0)?;
        let kernel = sys::monotonic();
        ensure!(kernel - monotonic < 1_000_000_000, "clock_gettime says {monotonic}, the kernel {kernel}");
        if let Some(time) = self.time {
            // SAFETY: takes no pointer.
            is_now("time", unsafe { time(std::ptr::null_mut()) })?;
        }
        if let Some(gettimeofday) = self.gettimeofday {
            let mut now = libc::timeval { tv_sec: 0, tv_usec: 0 };
            // SAFETY: writes the time to `now`, and no time zone.
            ensure!(unsafe { gettimeofday(&raw mut now, std::ptr::null_mut()) } == 0, "gettimeofday");
            is_now("gettimeofday", now.tv_sec)?;
        }
        if let Some(clock_getres) = self.clock_getres {
            let mut resolution = libc::timespec { tv_sec: 1, tv_nsec: 0 };
            // SAFETY: writes a time to `resolution`.
            let result = unsafe { clock_getres(libc::CLOCK_MONOTONIC, &raw mut resolution) };
            ensure!(result == 0 && resolution.tv_sec == 0 && resolution.tv_nsec > 0, "clock_getres");
        }
        if let Some(getcpu) = self.getcpu {
            let mut processor = u32::MAX;
            // SAFETY: writes a number to `processor`, and no node.
            let result = unsafe { getcpu(&raw mut processor, std::ptr::null_mut(), std::ptr::null_mut()) };
            ensure!(result == 0 && processor < 8192, "getcpu says {processor}");
        }
        Ok(())
    }
}
