//! POSIX message queues (mq_overview(7)).
//!
//! Names are those of the IPC namespace of the calling thread ([`crate::namespace::inside`]), as the kernel has them: without
//! the slash that the C library wants.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::ptr;

use rustix::fs::{Mode, OFlags};

use crate::mount::{Attributes as MountAttributes, Filesystem};
use crate::{Error, Result, fault, guarded};

/// `f_type` of the filesystem of queues, in statfs(2).
pub const MAGIC: i64 = 0x1980_0202;

/// What a queue can hold, and how much it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// How many messages it can hold.
    pub messages: u64,
    /// How long one can be, bytes.
    pub size: u64,
    /// How many wait.
    pub waiting: u64,
}

/// What a queue says of itself as a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// Bytes of the messages that wait.
    pub bytes: u64,
    /// Whether somebody has registered for the next message (mq_notify(3)).
    pub registered: bool,
    /// Who, if this process can see it.
    pub registrant: Option<i32>,
}

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Its priority; the higher, the sooner.
    pub priority: u32,
    /// Its bytes.
    pub content: Vec<u8>,
}

/// `struct mq_attr` of the kernel: flags, messages, size, waiting, and four that are reserved.
type RawAttributes = [libc::c_long; 8];

fn object(name: &CStr) -> String {
    format!("message queue /{}", name.to_string_lossy())
}

/// Opens a queue; the descriptor is closed on exec. `flags` are `O_RDWR` and the like, and `O_NONBLOCK`.
pub fn open(name: &CStr, flags: OFlags) -> Result<OwnedFd> {
    call_open(name, flags, 0, None)
}

/// Makes a queue that is not there yet.
pub fn create(name: &CStr, mode: u32, messages: u64, size: u64) -> Result<OwnedFd> {
    let attributes = [0, messages as libc::c_long, size as libc::c_long, 0, 0, 0, 0, 0];
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CREATE | OFlags::EXCL;
    let queue = call_open(name, flags, mode, Some(&attributes)).map_err(|error| {
        let detail = match error.errno() {
            Some(libc::EMFILE) => {
                "their user's queues would take more than RLIMIT_MSGQUEUE allows (ulimit -q)"
            }
            Some(libc::EINVAL) => "/proc/sys/fs/mqueue/msg_max and msgsize_max allow less",
            Some(libc::ENOSPC) => "/proc/sys/fs/mqueue/queues_max allows no more of them",
            _ => return error,
        };
        let what = format!("{} for {messages} messages of {size} bytes: {detail}", object(name));
        Error::new("mq_open", what, io::Error::from_raw_os_error(error.errno().unwrap_or_default()))
    })?;
    // The umask has taken from it.
    rustix::fs::fchmod(&queue, Mode::from_raw_mode(mode))
        .map_err(|errno| Error::new("fchmod", object(name), errno))?;
    Ok(queue)
}

fn call_open(name: &CStr, flags: OFlags, mode: u32, attributes: Option<&RawAttributes>) -> Result<OwnedFd> {
    fault::point();
    let flags = (flags | OFlags::CLOEXEC).bits();
    let attributes = attributes.map_or(ptr::null(), ptr::from_ref);
    // SAFETY: the kernel reads a terminated name and, if there are any, attributes, which are live.
    let opened = unsafe { libc::syscall(libc::SYS_mq_open, name.as_ptr(), flags, mode, attributes) };
    if opened < 0 {
        return Err(Error::last("mq_open", object(name)));
    }
    // SAFETY: a new descriptor that we own.
    Ok(unsafe { OwnedFd::from_raw_fd(opened as i32) })
}

/// Takes a queue's name away; it lives until nobody has it open.
pub fn unlink(name: &CStr) -> Result<()> {
    fault::point();
    // SAFETY: the kernel reads a terminated name.
    if unsafe { libc::syscall(libc::SYS_mq_unlink, name.as_ptr()) } < 0 {
        return Err(Error::last("mq_unlink", object(name)));
    }
    Ok(())
}

/// The names of all queues.
pub fn names() -> Result<Vec<CString>> {
    let mount = Filesystem::new("mqueue")?.mount(MountAttributes::empty())?;
    let fail = |errno| Error::new("readdir", "the message queues", errno);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::openat(mount.as_fd(), ".", flags, Mode::empty()).map_err(fail)?;
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::new(directory).map_err(fail)? {
        let name = entry.map_err(fail)?.file_name().to_owned();
        if name.as_bytes() != b"." && name.as_bytes() != b".." {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Where the limits of an IPC namespace are.
const LIMITS: &str = "/proc/sys/fs/mqueue";

/// The limits and defaults of the namespace, by name, in order.
pub fn limits() -> Result<Vec<(String, u64)>> {
    fault::point();
    let fail = |source| Error::new("read", LIMITS, source);
    let mut limits = Vec::new();
    for entry in std::fs::read_dir(LIMITS).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        let text = std::fs::read_to_string(entry.path()).map_err(fail)?;
        let value = text.trim().parse();
        let value =
            value.map_err(|_| Error::malformed("read", entry.path().display(), format!("{text:?}")))?;
        limits.push((entry.file_name().to_string_lossy().into_owned(), value));
    }
    limits.sort();
    Ok(limits)
}

/// Sets one of them, whose name must be one that [`limits`] gave.
pub fn set_limit(name: &str, value: u64) -> Result<()> {
    fault::point();
    let path = format!("{LIMITS}/{name}");
    std::fs::write(&path, value.to_string())
        .map_err(|source| Error::new("write", format_args!("{value} to {path}"), source))
}

/// Raises the namespace's limits, as far as they are lower, to what a queue needs.
pub fn allow(messages: u64, size: u64) -> Result<()> {
    let limits = limits()?;
    for (name, needed) in [("msg_max", messages), ("msgsize_max", size)] {
        if limits.iter().any(|(limit, value)| limit == name && *value < needed) {
            set_limit(name, needed)?;
        }
    }
    Ok(())
}

/// What a queue can hold and does.
pub fn attributes(queue: impl AsFd) -> Result<Attributes> {
    fault::point();
    let fd = queue.as_fd().as_raw_fd();
    let mut attributes: RawAttributes = [0; 8];
    let nothing: *const RawAttributes = ptr::null();
    // SAFETY: without new attributes the kernel only writes the live structure.
    if unsafe { libc::syscall(libc::SYS_mq_getsetattr, fd, nothing, &raw mut attributes) } < 0 {
        return Err(Error::last("mq_getattr", format_args!("descriptor {fd}")));
    }
    let [_, messages, size, waiting, ..] = attributes.map(|number| number.max(0) as u64);
    Ok(Attributes { messages, size, waiting })
}

/// What a queue that can be read says of itself.
pub fn status(queue: impl AsFd) -> Result<Status> {
    fault::point();
    let queue = queue.as_fd();
    let what = || format!("message queue of descriptor {}", queue.as_raw_fd());
    let mut buffer = [0; 128];
    let length =
        rustix::io::pread(queue, &mut buffer, 0).map_err(|errno| Error::new("pread", what(), errno))?;
    let text = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default()).into_owned();
    parse_status(&text).ok_or_else(|| Error::malformed("pread", what(), format!("the text {text:?}")))
}

/// `QSIZE:129 NOTIFY:0 SIGNO:0 NOTIFY_PID:0`, padded.
fn parse_status(text: &str) -> Option<Status> {
    let value = |key: &str| {
        let mut words = text.split_whitespace();
        words.find_map(|word| word.split_once(':').filter(|(name, _)| *name == key)).map(|(_, value)| value)
    };
    let [kind, signal, pid] = ["NOTIFY", "SIGNO", "NOTIFY_PID"].map(|key| value(key)?.parse::<i32>().ok());
    let (kind, signal, pid) = (kind?, signal?, pid?);
    Some(Status {
        bytes: value("QSIZE")?.parse().ok()?,
        // A kind of 0 is a signal.
        registered: kind != 0 || signal != 0 || pid != 0,
        registrant: (pid > 0).then_some(pid),
    })
}

/// A queue that is emptied and filled again, and how far that has come. A helper that is killed is followed by another.
struct Turn {
    fd: i32,
    buffer: Vec<u8>,
    /// The longest message.
    longest: usize,
    /// Priority and length of each message that was taken; as long as there may be any.
    taken: Vec<(u32, usize)>,
    count: usize,
    /// How many of them are back, and their bytes.
    back: usize,
    back_bytes: usize,
    bytes: usize,
    all_taken: bool,
    failure: i32,
}

/// How often a message that does not fit into the kernel's memory is tried again.
const ATTEMPTS: u32 = 10_000;

impl Turn {
    /// Takes all messages, then puts all back, in the same order: that is the order of those of one priority.
    fn run(&mut self) {
        while !self.all_taken {
            let room = self.buffer.len() - self.bytes;
            if self.count == self.taken.len() || room < self.longest {
                break;
            }
            let mut priority = 0_u32;
            // SAFETY: there is room for the longest message behind what the buffer has; no timeout is given, and the
            // queue does not block.
            let got = unsafe {
                let place = self.buffer.as_mut_ptr().add(self.bytes);
                let never: *const libc::timespec = ptr::null();
                libc::syscall(libc::SYS_mq_timedreceive, self.fd, place, room, &raw mut priority, never)
            };
            if got < 0 {
                let errno = last_errno();
                if errno != libc::EAGAIN {
                    self.failure = errno;
                }
                break;
            }
            if let Some(place) = self.taken.get_mut(self.count) {
                *place = (priority, got as usize);
            }
            self.bytes += got as usize;
            self.count += 1;
        }
        self.all_taken = true;
        let mut attempts = 0;
        while self.back < self.count {
            let Some((priority, length)) = self.taken.get(self.back).copied() else { return };
            // SAFETY: the message lies in the buffer, where it was put above.
            let sent = unsafe {
                let place = self.buffer.as_ptr().add(self.back_bytes);
                let never: *const libc::timespec = ptr::null();
                libc::syscall(libc::SYS_mq_timedsend, self.fd, place, length, priority, never)
            };
            if sent < 0 {
                attempts += 1;
                self.failure = last_errno();
                if attempts > ATTEMPTS {
                    return;
                }
                // SAFETY: takes no argument.
                unsafe { libc::sched_yield() };
                continue;
            }
            self.failure = 0;
            self.back_bytes += length;
            self.back += 1;
        }
    }
}

fn last_errno() -> i32 {
    // SAFETY: the C library's own variable, of this thread.
    unsafe { *libc::__errno_location() }
}

/// A copy of the messages in a queue, which stay in it, the next to be received first.
///
/// The kernel has no way to look at them, so all are received and sent again, by a helper that a `kill -9` of this process
/// does not end. Nobody else may use the queue meanwhile, and nobody may be registered for the next message: it would come.
///
/// `queue` is open for reading and writing, and does not block.
pub fn copy_messages(queue: impl AsFd) -> Result<Vec<Message>> {
    fault::point();
    let queue = queue.as_fd();
    let what = || format!("message queue of descriptor {}", queue.as_raw_fd());
    let Attributes { size, waiting, .. } = attributes(queue)?;
    if waiting == 0 {
        return Ok(Vec::new());
    }
    let bytes = status(queue)?.bytes as usize;
    let mut turn = Turn {
        fd: queue.as_raw_fd(),
        buffer: vec![0; bytes + size as usize],
        longest: size as usize,
        taken: vec![(0, 0); waiting as usize],
        count: 0,
        back: 0,
        back_bytes: 0,
        bytes: 0,
        all_taken: false,
        failure: 0,
    };
    // Without a helper nothing has been taken.
    let mut finished = guarded::run(|_| turn.run()).map_err(|source| Error::new("clone", what(), source))?;
    while !finished {
        // It was killed, by somebody who has not killed us.
        finished = guarded::run(|_| turn.run()).unwrap_or_else(|_| {
            turn.run();
            true
        });
    }
    if turn.failure != 0 {
        let call = if turn.back < turn.count { "mq_send" } else { "mq_receive" };
        return Err(Error::new(call, what(), io::Error::from_raw_os_error(turn.failure)));
    }
    let mut rest = turn.buffer.as_slice();
    let mut messages = Vec::with_capacity(turn.count);
    for (priority, length) in turn.taken.iter().take(turn.count) {
        let (content, behind) = rest.split_at_checked(*length).unwrap_or((rest, &[]));
        messages.push(Message { priority: *priority, content: content.to_vec() });
        rest = behind;
    }
    Ok(messages)
}

/// Sends a message to a queue that does not block.
pub fn send(queue: impl AsFd, message: &Message) -> Result<()> {
    fault::point();
    let fd = queue.as_fd().as_raw_fd();
    let Message { priority, content } = message;
    let never: *const libc::timespec = ptr::null();
    // SAFETY: the kernel reads as many bytes as there are.
    let sent = unsafe {
        libc::syscall(libc::SYS_mq_timedsend, fd, content.as_ptr(), content.len(), *priority, never)
    };
    if sent < 0 {
        return Err(Error::last("mq_send", format_args!("descriptor {fd}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::namespace::{self, Kind};

    #[test]
    fn what_a_queue_says_is_understood() {
        let text = "QSIZE:129        NOTIFY:0     SIGNO:10    NOTIFY_PID:8260  \n";
        let status = Status { bytes: 129, registered: true, registrant: Some(8260) };
        assert_eq!(parse_status(text), Some(status));
        let text = "QSIZE:0          NOTIFY:0     SIGNO:0     NOTIFY_PID:0     \n";
        assert_eq!(parse_status(text), Some(Status { bytes: 0, registered: false, registrant: None }));
        // Of somebody whom this process cannot see.
        let text = "QSIZE:0          NOTIFY:2     SIGNO:0     NOTIFY_PID:0     \n";
        assert_eq!(parse_status(text), Some(Status { bytes: 0, registered: true, registrant: None }));
        assert_eq!(parse_status("QSIZE:-1 NOTIFY:0 SIGNO:0 NOTIFY_PID:0"), None);
        assert_eq!(parse_status("QSIZE:1 NOTIFY:0 SIGNO:0"), None);
        assert_eq!(parse_status(""), None);
    }

    #[test]
    fn messages_are_copied_and_stay_in_their_order() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let work = || -> Result<()> {
            namespace::unshare(&[Kind::Ipc])?;
            assert_eq!(names()?, [] as [CString; 0]);
            let queue = create(c"test", 0o666, 6, 100)?;
            assert_eq!(rustix::fs::fstat(&queue).unwrap().st_mode & 0o7777, 0o666);
            assert_eq!(copy_messages(&queue)?, []);
            let message = |priority, content: &[u8]| Message { priority, content: content.to_vec() };
            // The queue is full.
            let sent = [(0, &b"a"[..]), (7, b"b"), (7, &[9; 100]), (0, b""), (3, b"c"), (7, b"d")];
            for (priority, content) in sent {
                send(&queue, &message(priority, content))?;
            }
            assert!(send(&queue, &message(1, b"one too many")).is_err());
            let expected = [(7, &b"b"[..]), (7, &[9; 100]), (7, b"d"), (3, b"c"), (0, b"a"), (0, b"")]
                .map(|(priority, content)| message(priority, content));
            for _ in 0..2 {
                assert_eq!(copy_messages(&queue)?, expected);
                assert_eq!(attributes(&queue)?, Attributes { messages: 6, size: 100, waiting: 6 });
                assert_eq!(status(&queue)?.bytes, 104);
            }
            assert_eq!(names()?, [c"test".to_owned()]);
            assert!(open(c"none", OFlags::RDONLY).is_err());
            unlink(c"test")?;
            assert!(names()?.is_empty());
            let before = limits()?;
            allow(1, 1)?;
            assert_eq!(limits()?, before);
            allow(77, 10_000)?;
            let raised = limits()?;
            assert!(
                raised.contains(&("msg_max".into(), 77)) && raised.contains(&("msgsize_max".into(), 10_000))
            );
            Ok(())
        };
        std::thread::scope(|scope| scope.spawn(work).join().unwrap()).unwrap();
    }
}
