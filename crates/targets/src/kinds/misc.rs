//! What a process has one of: umask, directory, scheduling, limits, names, layout, switches, and what it and the C
//! library registered.

use std::fmt::Write as _;
use std::fs;
use std::mem::MaybeUninit;

use anyhow::{Context, Result, ensure};
use rustix::fs::Mode;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use super::{Setting, Verify};
use crate::sys;

pub fn set_up(setting: &Setting) -> Result<Box<Verify>> {
    let directory = setting.protocol.beside("directory");
    fs::create_dir_all(&directory)?;
    let directory = directory.canonicalize()?;
    std::env::set_current_dir(&directory)?;
    rustix::process::umask(Mode::from_raw_mode(0o137));
    rustix::process::setpriority_process(None, 5).context("nice")?;
    let priority = libc::sched_param { sched_priority: 0 };
    // SAFETY: the kernel reads the structure.
    sys::check(i64::from(unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &raw const priority) }))
        .context("SCHED_BATCH")?;
    let mut cpus = CpuSet::new();
    cpus.set(0);
    sched_setaffinity(None, &cpus).context("pinning to CPU 0")?;
    fs::write("/proc/self/oom_score_adj", "321")?;
    rustix::thread::set_name(c"renamed :) 0")?;
    rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(123_456))?;
    rustix::thread::disable_transparent_huge_pages(true)?;
    // SAFETY: no pointers; a flag that only matters at the next execve.
    sys::check(i64::from(unsafe { libc::personality(libc::ADDR_NO_RANDOMIZE as u64) }))?;
    set_io_priority()?;
    set_switches()?;
    let limit = |current, maximum| Rlimit { current: Some(current), maximum: Some(maximum) };
    setrlimit(Resource::Nofile, limit(200, 300))?;
    setrlimit(Resource::Core, limit(0, 4096))?;
    setrlimit(Resource::Stack, limit(4 << 20, 16 << 20))?;

    let described = describe()?;
    Ok(Box::new(move || {
        sys::compare_lines("the process", &describe()?, &described)?;
        let found = std::env::current_dir()?;
        ensure!(found == directory, "the working directory is {}", found.display());
        check_rseq()?;
        Ok(String::new())
    }))
}

/// Best effort, level 6, for this thread.
fn set_io_priority() -> Result<()> {
    const WHO_PROCESS: i32 = 1;
    // SAFETY: no pointers.
    sys::check(unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, 0, (2 << 13) | 6) })
        .context("ioprio_set")?;
    Ok(())
}

/// Barriers that this process has registered for, merged pages, notice of failed memory, memory from node 0 by turns,
/// and the nice value of its session.
fn set_switches() -> Result<()> {
    let node = 1_u64;
    // SAFETY: takes numbers, and one mask that the kernel reads.
    unsafe {
        sys::check(libc::syscall(libc::SYS_membarrier, 1 << 2, 0, 0)).context("membarrier")?;
        sys::check(libc::syscall(libc::SYS_membarrier, 1 << 4, 0, 0)).context("membarrier")?;
        sys::check(i64::from(libc::prctl(libc::PR_MCE_KILL, 1, 1, 0, 0))).context("PR_MCE_KILL")?;
        // Not every kernel has these (CONFIG_KSM, CONFIG_NUMA, CONFIG_SCHED_AUTOGROUP).
        libc::prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0);
        libc::syscall(libc::SYS_set_mempolicy, 3, &raw const node, 64);
    }
    let _ = fs::write("/proc/self/autogroup", "4");
    Ok(())
}

const PR_SET_MEMORY_MERGE: i32 = 67;

/// What [`set_switches`] set.
fn switches(text: &mut String) -> Result<()> {
    let (mut policy, mut nodes) = (0_u32, [0_u64; 16]);
    // SAFETY: the kernel writes one number and a mask of 1024 bits.
    unsafe {
        let barriers = libc::syscall(libc::SYS_membarrier, 1 << 9, 0, 0);
        let errors = libc::prctl(libc::PR_MCE_KILL_GET, 0, 0, 0, 0);
        let merge = libc::prctl(PR_SET_MEMORY_MERGE + 1, 0, 0, 0, 0);
        libc::syscall(libc::SYS_get_mempolicy, &raw mut policy, nodes.as_mut_ptr(), 1024, 0, 0);
        let _ = writeln!(text, "barriers {barriers:#x}\nmemory errors {errors}\nmerged pages {merge}");
        // A private barrier on all processors fails where the process is not registered.
        sys::check(libc::syscall(libc::SYS_membarrier, 1 << 3, 0, 0)).context("a barrier")?;
    }
    let _ = writeln!(text, "memory policy {policy} {:#x}", nodes[0]);
    let session = fs::read_to_string("/proc/self/autogroup").unwrap_or_default();
    let _ = writeln!(text, "session's nice value {:?}", session.split_whitespace().last());
    Ok(())
}

fn describe() -> Result<String> {
    let mut text = String::new();
    let umask = rustix::process::umask(Mode::empty());
    rustix::process::umask(umask);
    let _ = writeln!(text, "umask {umask:?}");
    let _ = writeln!(text, "timer slack {}", rustix::thread::current_timer_slack()?);
    let _ = writeln!(text, "no THP {}", rustix::thread::transparent_huge_pages_are_disabled()?);
    let _ = writeln!(text, "clear-tid {:?}", rustix::thread::get_clear_child_tid_address()?);
    let _ =
        writeln!(text, "CPU 0 alone {:?}", sched_getaffinity(None).map(|set| (set.is_set(0), set.count()))?);
    for resource in [Resource::Nofile, Resource::Core, Resource::Stack, Resource::As, Resource::Nproc] {
        let _ = writeln!(text, "{resource:?} {:?}", getrlimit(resource));
    }
    let (mut head, mut length) = (0_usize, 0_usize);
    // SAFETY: the kernel writes two words; the other calls take no pointers.
    unsafe {
        sys::check(libc::syscall(libc::SYS_get_robust_list, 0, &raw mut head, &raw mut length))?;
        let io_priority = libc::syscall(libc::SYS_ioprio_get, 1, 0);
        let personality = libc::personality(0xffff_ffff);
        let _ = writeln!(
            text,
            "robust list {head:#x} {length}\nI/O priority {io_priority}\npersonality {personality:#x}"
        );
    }
    for file in ["comm", "cmdline", "environ", "auxv", "oom_score_adj", "loginuid", "coredump_filter"] {
        let content = fs::read(format!("/proc/self/{file}")).unwrap_or_default();
        let _ = writeln!(text, "{file} {}", content.escape_ascii());
    }
    for link in ["exe", "root", "cwd"] {
        let _ = writeln!(text, "{link} {}", fs::read_link(format!("/proc/self/{link}"))?.display());
    }
    switches(&mut text)?;
    layout(&mut text)?;
    Ok(text)
}

/// Fields of `/proc/self/stat` (proc(5)): nice, code, stack, data, break, arguments, environment, policy, priority.
fn layout(text: &mut String) -> Result<()> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<_> = stat.rsplit(") ").next().unwrap_or_default().split_whitespace().collect();
    for number in [18, 19, 26, 27, 28, 40, 41, 45, 46, 47, 48, 49, 50, 51] {
        let value =
            fields.get(number - 3).with_context(|| format!("no field {number} in /proc/self/stat"))?;
        let _ = writeln!(text, "field {number} {value}");
    }
    Ok(())
}

/// The C library registered rseq for this thread: the kernel refuses a second area.
fn check_rseq() -> Result<()> {
    #[repr(align(32))]
    struct Area(#[expect(dead_code, reason = "only its address counts")] MaybeUninit<[u8; 32]>);
    let mut area = Area(MaybeUninit::zeroed());
    // SAFETY: the kernel refuses the area where one is registered; where none is, this one is taken back at once.
    let registered = unsafe {
        let area = &raw mut area;
        let outcome = sys::check(libc::syscall(libc::SYS_rseq, area, 32, 0, 0x5305_3053));
        if outcome.is_ok() {
            libc::syscall(libc::SYS_rseq, area, 32, 1, 0x5305_3053);
        }
        outcome.is_err()
    };
    ensure!(registered, "rseq is no longer registered");
    Ok(())
}
