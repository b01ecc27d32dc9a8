//! The features, each with how it is tried and what is lost without it.

use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use limosa_kernel::mount::Filesystem;
use limosa_kernel::namespace::{self, Kind};
use limosa_kernel::net::nft::{PacketLock, Scope};
use limosa_kernel::net::rtnetlink::{Rtnetlink, Veth};
use limosa_kernel::net::sock_diag::Diag;
use limosa_kernel::net::tcp_repair::{self, Mode};
use limosa_kernel::pagemap::PagemapScanner;
use limosa_kernel::probe::{self, Tracee};
use limosa_kernel::proc::ProcDir;
use limosa_kernel::ptrace::{self, Options};
use limosa_kernel::task::{self, Comparison};
use rustix::net::{AddressFamily, SocketType};

use super::{Area, Feature};

/// Why a feature is not there.
type Answer = Result<(), String>;

/// How a feature is tried.
pub(super) struct Probe {
    pub(super) name: &'static str,
    pub(super) area: Area,
    pub(super) lost: &'static str,
    pub(super) attempt: fn() -> Answer,
}

const fn probe(area: Area, name: &'static str, lost: &'static str, attempt: fn() -> Answer) -> Probe {
    Probe { name, area, lost, attempt }
}

pub(super) const PROBES: [Probe; 31] = [
    probe(Area::Essential, "ptrace(PTRACE_SEIZE)", "no process can be frozen", || traced(|_| Ok(()))),
    probe(Area::Essential, "clone3(set_tid)", "processes and threads cannot get their IDs back", || {
        said(probe::clone_with_pid())
    }),
    probe(Area::Essential, "pidfd_getfd", "descriptors cannot be looked at", descriptor_of_own),
    probe(Area::Essential, "kcmp", "descriptors that are shared cannot be told from copies", || {
        said(task::kcmp(own(), own(), Comparison::Vm, 0, 0))
    }),
    probe(Area::Essential, "/proc/PID/task/TID/children", "children of a process cannot be found", || {
        said(ProcDir::open(own()).and_then(|proc| proc.children()))
    }),
    probe(
        Area::Essential,
        "/proc/PID/map_files",
        "mapped files and shared memory cannot be opened",
        map_files,
    ),
    probe(Area::Essential, "arch_prctl(ARCH_MAP_VDSO_64)", "the vDSO cannot be put where it was", || {
        said(probe::map_vdso())
    }),
    probe(Area::Essential, "prctl(PR_GET_TID_ADDRESS)", "joining a restored thread waits for ever", || {
        said(probe::tid_address())
    }),
    probe(
        Area::Essential,
        "prctl(PR_SET_MM_MAP)",
        "command line, environment and brk cannot be put back",
        || said(probe::set_mm_map()),
    ),
    probe(
        Area::Essential,
        "ptrace(PTRACE_GET_RSEQ_CONFIGURATION)",
        "threads lose their restartable sequences",
        || traced(|pid| said(ptrace::rseq_configuration(pid))),
    ),
    probe(Area::Essential, "ptrace(PTRACE_PEEKSIGINFO)", "pending signals are lost", || {
        traced(|pid| said(ptrace::pending_signals(pid, true)))
    }),
    probe(
        Area::Memory,
        "mmap(MAP_DROPPABLE)",
        "memory that may be dropped becomes ordinary memory, which is still wiped in children",
        || said(probe::droppable_memory()),
    ),
    probe(Area::Memory, "PAGEMAP_SCAN", "finding the pages of large sparse memory is slow", pagemap_scan),
    probe(Area::Memory, "userfaultfd", "no lazy restore and no post-copy", || userfault(0)),
    probe(Area::Memory, "userfaultfd WP_ASYNC", "no dirty tracking: no pre-copy", || userfault(1 << 15)),
    probe(Area::Memory, "userfaultfd MOVE", "pages are copied once more by post-copy", || userfault(1 << 16)),
    probe(
        Area::Objects,
        "ptrace(PTRACE_SECCOMP_GET_FILTER)",
        "processes with seccomp filters are refused",
        || {
            traced(|pid| match ptrace::seccomp_filter(pid, 0) {
                // It has none, so the kernel was willing to look.
                Err(error) if error.errno() == Some(libc::EINVAL) => Ok(()),
                other => said(other),
            })
        },
    ),
    probe(
        Area::Objects,
        "PTRACE_O_SUSPEND_SECCOMP",
        "processes with strict seccomp filters cannot be asked",
        || said(Tracee::new(Options::TRACE_SYSGOOD | Options::SUSPEND_SECCOMP)),
    ),
    probe(
        Area::Objects,
        "prctl(PR_TIMER_CREATE_RESTORE_IDS)",
        "POSIX timers get their IDs back by trying",
        || said(probe::timer_restore_ids()),
    ),
    probe(Area::Network, "TCP_REPAIR", "connected TCP sockets are refused", tcp_repair),
    probe(Area::Network, "sock_diag", "unix sockets cannot be told apart", || {
        said(Diag::open().and_then(|mut diag| diag.unix()))
    }),
    probe(Area::Network, "nftables", "packets cannot be held back: connections may be reset", || {
        in_namespaces(&[Kind::Network], || said(PacketLock::new("check", Scope::Namespace)))
    }),
    probe(Area::Containers, "veth", "containers have no network", || {
        in_namespaces(&[Kind::Network], || said(veth()))
    }),
    probe(Area::Containers, "bridge", "this host cannot make a bridge for containers", || {
        in_namespaces(&[Kind::Network], || {
            said(Rtnetlink::open().and_then(|mut link| link.create_bridge("check")))
        })
    }),
    probe(Area::Containers, "overlayfs", "no containers", || said(Filesystem::new("overlay"))),
    probe(Area::Containers, "mount namespaces", "no containers", || in_namespaces(&[Kind::Mount], || Ok(()))),
    probe(Area::Containers, "PID namespaces", "no containers", || in_namespaces(&[Kind::Pid], || Ok(()))),
    probe(Area::Containers, "ipc, uts and cgroup namespaces", "no containers", || {
        in_namespaces(&[Kind::Ipc, Kind::Uts, Kind::Cgroup], || Ok(()))
    }),
    probe(Area::Containers, "time namespaces", "clocks of a moved container jump", || {
        in_namespaces(&[Kind::Time], || Ok(()))
    }),
    probe(
        Area::Containers,
        "cgroup freezer",
        "a container whose migration's outcome is unknown cannot be kept frozen",
        freezer,
    ),
    probe(
        Area::Objects,
        "System V IDs (/proc/sys/kernel/shm_next_id)",
        "System V IPC objects are refused",
        || said(std::fs::metadata("/proc/sys/kernel/shm_next_id")),
    ),
];

fn said<T, E: std::fmt::Display>(outcome: Result<T, E>) -> Answer {
    outcome.map(drop).map_err(|error| error.to_string())
}

fn own() -> i32 {
    std::process::id() as i32
}

/// Tries something on a stopped child.
fn traced(attempt: impl FnOnce(i32) -> Answer) -> Answer {
    let tracee = Tracee::new(Options::TRACE_SYSGOOD).map_err(|error| error.to_string())?;
    attempt(tracee.pid())
}

fn descriptor_of_own() -> Answer {
    let pidfd = task::pidfd_open(own()).map_err(|error| error.to_string())?;
    said(task::pidfd_getfd(&pidfd, pidfd.as_raw_fd()))
}

fn map_files() -> Answer {
    let mut entries = std::fs::read_dir("/proc/self/map_files").map_err(|error| error.to_string())?;
    let entry = entries.next().ok_or("it is empty")?.map_err(|error| error.to_string())?;
    said(std::fs::metadata(entry.path()))
}

fn pagemap_scan() -> Answer {
    let proc = ProcDir::open(own()).map_err(|error| error.to_string())?;
    let scanner = PagemapScanner::open(&proc).map_err(|error| error.to_string())?;
    if scanner.has_scan() { Ok(()) } else { Err("the kernel does not know this ioctl".into()) }
}

fn userfault(feature: u64) -> Answer {
    let features = probe::userfaultfd_features().map_err(|error| error.to_string())?;
    if features & feature == feature { Ok(()) } else { Err("the kernel does not list it".into()) }
}

fn tcp_repair() -> Answer {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None)
        .map_err(|errno| format!("socket: {errno}"))?;
    said(tcp_repair::set_mode(&socket, Mode::On))
}

fn veth() -> limosa_kernel::Result<()> {
    let peer_namespace = namespace::of_thread(Kind::Network)?;
    let veth = Veth { name: "check0", peer_name: "check1", peer_namespace, peer_address: None };
    Rtnetlink::open()?.create_veth(&veth)
}

/// Tries something in new namespaces, on a thread that ends with them.
fn in_namespaces(kinds: &[Kind], attempt: impl FnOnce() -> Answer + Send) -> Answer {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            said(namespace::unshare(kinds))?;
            attempt()
        });
        thread.join().unwrap_or_else(|_| Err("the thread that tried it panicked".into()))
    })
}

/// A group of our own that can be frozen: `cgroup.freeze` of version 2, or the freezer of version 1.
fn freezer() -> Answer {
    let proc = ProcDir::open(own()).map_err(|error| error.to_string())?;
    let mounts = proc.mountinfo().map_err(|error| error.to_string())?;
    let mut answer = Err("no cgroup hierarchy with a freezer is mounted".to_owned());
    for mount in mounts {
        let point = PathBuf::from(String::from_utf8_lossy(&mount.point).into_owned());
        let has = |file: &str| group_with(&point, file);
        match mount.fs_type.as_slice() {
            b"cgroup2" => answer = has("cgroup.freeze"),
            b"cgroup" => answer = has("freezer.state"),
            _ => continue,
        }
        if answer.is_ok() {
            break;
        }
    }
    answer
}

/// Whether a new group in the hierarchy at `point` has `file`.
fn group_with(point: &Path, file: &str) -> Answer {
    let group = point.join(format!("limosa-check.{}", own()));
    std::fs::create_dir(&group).map_err(|error| format!("mkdir {}: {error}", group.display()))?;
    let found = group.join(file).exists();
    let _ = std::fs::remove_dir(&group);
    if found { Ok(()) } else { Err(format!("groups of {} have no {file}", point.display())) }
}

/// The capabilities that Limosa uses: number, name, what is lost.
const CAPABILITIES: [(u32, &str, &str); 12] = [
    (40, "CAP_CHECKPOINT_RESTORE", "CAP_SYS_ADMIN must stand in for it"),
    (21, "CAP_SYS_ADMIN", "no containers, no seccomp filters"),
    (19, "CAP_SYS_PTRACE", "only one's own processes, as far as the kernel lets them be traced"),
    (12, "CAP_NET_ADMIN", "no TCP connections, no containers with a network"),
    (13, "CAP_NET_RAW", "a moved container's addresses are not announced"),
    (24, "CAP_SYS_RESOURCE", "hard limits cannot be raised, nor other users' limits read from outside"),
    (5, "CAP_KILL", "other users' processes cannot be ended"),
    (7, "CAP_SETUID", "processes of other users cannot be restored"),
    (6, "CAP_SETGID", "processes of other groups cannot be restored"),
    (8, "CAP_SETPCAP", "bounding sets cannot be restored"),
    (18, "CAP_SYS_CHROOT", "no containers, no processes with another root directory"),
    (23, "CAP_SYS_NICE", "raised priorities and real-time scheduling cannot be restored"),
];

pub(super) fn capabilities() -> Vec<Feature> {
    let status = ProcDir::open(own()).and_then(|proc| proc.status());
    let effective = status.map_err(|error| error.to_string()).map(|status| status.capabilities.effective);
    CAPABILITIES
        .iter()
        .map(|(number, name, lost)| {
            let why = match &effective {
                Ok(set) if set & 1 << number != 0 => None,
                Ok(_) => Some("this process does not have it".to_owned()),
                Err(error) => Some(error.clone()),
            };
            Feature { name, area: Area::Privileges, available: why.is_none(), why, lost }
        })
        .collect()
}

/// Features of x86-64 processors whose state a thread may hold, in the spelling of `/proc/cpuinfo`.
const PROCESSOR: [&str; 6] = ["xsave", "avx", "avx2", "avx512f", "amx_tile", "pku"];

pub(super) fn processor() -> Vec<Feature> {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = text.lines().find_map(|line| line.strip_prefix("flags")).unwrap_or_default();
    let has = |name: &str| flags.split_ascii_whitespace().any(|flag| flag == name);
    PROCESSOR
        .iter()
        .map(|name| Feature {
            name,
            area: Area::Processor,
            available: has(name),
            why: (!has(name)).then(|| "this processor does not have it".to_owned()),
            lost: "checkpoints of programs that use it cannot be restored here",
        })
        .collect()
}
