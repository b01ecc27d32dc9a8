//! `fdinfo` of real files of every kind, made by this process.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use rustix::event::{EventfdFlags, epoll};
use rustix::fs::inotify;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};

use super::*;

fn info(file: impl AsFd) -> FdInfo {
    let dir = ProcDir::open(std::process::id() as i32).unwrap();
    dir.fdinfo(file.as_fd().as_raw_fd()).unwrap()
}

#[test]
fn a_regular_file_has_position_flags_and_locks() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    std::io::Write::write_all(&mut file, b"0123456789").unwrap();
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let lock = |kind: i32, start, len| libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: start,
        l_len: len,
        l_pid: 0,
    };
    for (command, lock) in
        [(libc::F_SETLK, lock(libc::F_WRLCK, 2, 3)), (libc::F_OFD_SETLK, lock(libc::F_RDLCK, 100, 0))]
    {
        // SAFETY: fcntl reads the struct it is given.
        assert_eq!(unsafe { libc::fcntl(file.as_raw_fd(), command, &raw const lock) }, 0);
    }
    let info = info(&file);
    let ino = file.as_file().metadata().unwrap().ino();
    assert_eq!((info.pos, info.ino), (10, Some(ino)));
    assert_eq!(
        info.flags & (libc::O_ACCMODE | libc::O_CLOEXEC) as u32,
        (libc::O_RDWR | libc::O_CLOEXEC) as u32
    );
    assert!(info.mnt_id.is_some());
    assert_eq!((info.extra, info.unknown), (FdExtra::None, vec![]));
    let pid = std::process::id() as i32;
    let mut locks: Vec<_> = info
        .locks
        .iter()
        .map(|lock| {
            assert_eq!(lock.ino, ino);
            (lock.start, lock.end, lock.kind, lock.access, lock.pid)
        })
        .collect();
    locks.sort_by_key(|lock| (lock.0, lock.1));
    assert_eq!(
        locks,
        [
            (0, None, LockKind::Flock, LockAccess::Write, pid),
            (2, Some(4), LockKind::Posix, LockAccess::Write, pid),
            (100, None, LockKind::OpenFileDescription, LockAccess::Read, -1),
        ]
    );
}

#[test]
fn an_eventfd_tells_its_count() {
    let plain = rustix::event::eventfd(1234, EventfdFlags::CLOEXEC).unwrap();
    let FdExtra::EventFd(told) = info(&plain).extra else { panic!("not an eventfd") };
    assert_eq!(told.count, 1234);
    assert!(told.semaphore.is_none_or(|semaphore| !semaphore));
    let semaphore = rustix::event::eventfd(2, EventfdFlags::SEMAPHORE).unwrap();
    let FdExtra::EventFd(told_semaphore) = info(&semaphore).extra else { panic!("not an eventfd") };
    assert!(told_semaphore.semaphore.is_none_or(|semaphore| semaphore));
    assert_ne!(told.id, told_semaphore.id);
}

#[test]
fn an_epoll_tells_what_it_watches() {
    let watcher = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    assert_eq!(info(&watcher).extra, FdExtra::None);
    let one = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let two = File::open("/dev/ptmx").unwrap();
    epoll::add(&watcher, &one, epoll::EventData::new_u64(u64::MAX), epoll::EventFlags::IN).unwrap();
    let edge = epoll::EventFlags::OUT | epoll::EventFlags::ET;
    epoll::add(&watcher, &two, epoll::EventData::new_u64(5), edge).unwrap();
    let FdExtra::Epoll(entries) = info(&watcher).extra else { panic!("not an epoll") };
    assert_eq!(entries.len(), 2);
    let entry = |fd: i32| entries.iter().find(|entry| entry.fd == fd).unwrap();
    // The kernel always adds EPOLLERR and EPOLLHUP.
    let always = (libc::EPOLLERR | libc::EPOLLHUP) as u32;
    let first = entry(one.as_raw_fd());
    assert_eq!((first.data, first.events), (u64::MAX, libc::EPOLLIN as u32 | always));
    let second = entry(two.as_raw_fd());
    assert_eq!((second.data, second.events), (5, (libc::EPOLLOUT | libc::EPOLLET) as u32 | always));
    assert_eq!(second.ino, two.metadata().unwrap().ino());
}

#[test]
fn a_timerfd_tells_the_time_left() {
    let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC).unwrap();
    let setting = Itimerspec {
        it_interval: Timespec { tv_sec: 7, tv_nsec: 500 },
        it_value: Timespec { tv_sec: 1000, tv_nsec: 0 },
    };
    rustix::time::timerfd_settime(&timer, TimerfdTimerFlags::empty(), &setting).unwrap();
    let FdExtra::TimerFd(told) = info(&timer).extra else { panic!("not a timerfd") };
    assert_eq!((told.clock, told.ticks, told.interval), (libc::CLOCK_MONOTONIC, 0, (7, 500)));
    assert!((990..=1000).contains(&told.value.0), "{told:?}");
    let absolute = TimerfdTimerFlags::ABSTIME;
    let past = Itimerspec { it_value: Timespec { tv_sec: 1, tv_nsec: 0 }, ..setting };
    rustix::time::timerfd_settime(&timer, absolute, &past).unwrap();
    let FdExtra::TimerFd(told) = info(&timer).extra else { panic!("not a timerfd") };
    assert_eq!(told.settime_flags, libc::TFD_TIMER_ABSTIME as u32);
}

#[test]
fn a_signalfd_tells_its_mask() {
    // SAFETY: sigset functions write the set they are given; the descriptor is new and ours.
    let signals = unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGUSR1);
        libc::sigaddset(&raw mut set, 64);
        OwnedFd::from_raw_fd(libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC))
    };
    let mask = 1 << (libc::SIGUSR1 - 1) | 1 << 63;
    assert_eq!(info(&signals).extra, FdExtra::SignalFd { mask });
}

#[test]
fn an_inotify_tells_its_watches() {
    let watcher = inotify::init(inotify::CreateFlags::CLOEXEC).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let wd = inotify::add_watch(&watcher, dir.path(), inotify::WatchFlags::CREATE).unwrap();
    let FdExtra::Inotify(watches) = info(&watcher).extra else { panic!("not an inotify") };
    let [watch] = &watches[..] else { panic!("not one watch: {watches:?}") };
    assert_eq!((watch.wd, watch.ino), (wd, dir.path().metadata().unwrap().ino()));
    assert_eq!(watch.mask & libc::IN_ALL_EVENTS, libc::IN_CREATE);
    assert!(watch.handle.as_ref().is_none_or(|handle| !handle.bytes.is_empty()));
}

#[test]
fn a_pidfd_tells_its_process() {
    let pid = std::process::id() as i32;
    let pidfd = crate::task::pidfd_open(pid).unwrap();
    let FdExtra::PidFd(told) = info(&pidfd).extra else { panic!("not a pidfd") };
    assert_eq!((told.pid, told.ns_pid.first()), (pid, Some(&pid)));
}

#[test]
fn a_pty_master_tells_its_number() {
    let master =
        rustix::pty::openpt(rustix::pty::OpenptFlags::RDWR | rustix::pty::OpenptFlags::NOCTTY).unwrap();
    let name = rustix::pty::ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
    let index = name.rsplit('/').next().unwrap().parse().unwrap();
    assert_eq!(info(&master).extra, FdExtra::PtyMaster { index });
}

#[test]
fn a_unix_socket_tells_descriptors_in_flight() {
    let (one, other) = std::os::unix::net::UnixStream::pair().unwrap();
    assert_eq!(info(&one).extra, FdExtra::UnixSocket { scm_fds: 0 });
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut message = rustix::net::SendAncillaryBuffer::new(&mut space);
    let fds = [other.as_fd()];
    assert!(message.push(rustix::net::SendAncillaryMessage::ScmRights(&fds)));
    let bytes = [std::io::IoSlice::new(b"x")];
    rustix::net::sendmsg(&one, &bytes, &mut message, rustix::net::SendFlags::empty()).unwrap();
    assert_eq!(info(&other).extra, FdExtra::UnixSocket { scm_fds: 1 });
}

#[test]
fn descriptors_are_listed_with_their_links() {
    let file = File::open("/dev/null").unwrap();
    let (reader, _writer) = rustix::pipe::pipe().unwrap();
    let dir = ProcDir::open(std::process::id() as i32).unwrap();
    let fds = dir.fds().unwrap();
    assert!(fds.contains(&file.as_raw_fd()) && fds.contains(&reader.as_raw_fd()));
    assert!(fds.is_sorted());
    assert_eq!(dir.fd_link(file.as_raw_fd()).unwrap(), b"/dev/null");
    let ino = rustix::fs::fstat(&reader).unwrap().st_ino;
    assert_eq!(dir.fd_link(reader.as_raw_fd()).unwrap(), format!("pipe:[{ino}]").as_bytes());
    assert_eq!(dir.file_id(&format!("fd/{}", reader.as_raw_fd())).unwrap().ino, ino);
}

#[test]
fn posix_timers_are_listed() {
    let mut id = std::ptr::null_mut();
    // SAFETY: timer_create reads the event and writes the ID; the timer is deleted below.
    unsafe {
        let mut event: libc::sigevent = std::mem::zeroed();
        event.sigev_notify = libc::SIGEV_SIGNAL;
        event.sigev_signo = libc::SIGUSR2;
        event.sigev_value.sival_ptr = 0x1234_5678 as *mut _;
        assert_eq!(libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut id), 0);
    }
    let pid = std::process::id() as i32;
    let timers = ProcDir::open(pid).unwrap().timers().unwrap();
    // SAFETY: the timer made above.
    unsafe { libc::timer_delete(id) };
    let timer = timers.iter().find(|timer| timer.signal == libc::SIGUSR2).unwrap();
    assert_eq!(
        (timer.value, timer.clock, timer.notify),
        (0x1234_5678, libc::CLOCK_MONOTONIC, TimerNotify::Signal)
    );
    assert_eq!((timer.to_thread, timer.target), (false, pid));
}
