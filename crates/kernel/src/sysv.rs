//! System V IPC: shared memory, semaphores and message queues (sysvipc(7)).
//!
//! Everything here acts in the IPC namespace of the calling thread ([`crate::namespace::inside`]). Objects are made
//! with the ID they are to have by way of `/proc/sys/kernel/{shm,sem,msg}_next_id`.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;

use crate::fault;
use crate::{Error, Result};

const MSG_COPY: i32 = 0o40_000;
const SHM_DEST: u32 = 0o1000;
/// Largest message that is believed (`/proc/sys/kernel/msgmax` is 8192 unless raised).
const MESSAGE_MAX: usize = 16 << 20;

/// Who may use an object, and the key by which it is found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Permissions {
    /// The key; 0 (`IPC_PRIVATE`) if none.
    pub key: i32,
    /// The identifier.
    pub id: i32,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// A shared-memory segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Key, ID, owner.
    pub permissions: Permissions,
    /// Bytes.
    pub size: u64,
    /// How often it is attached.
    pub attached: u64,
    /// Whether it ends with the last attachment (`IPC_RMID` was called).
    pub removed: bool,
}

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Its type, positive.
    pub kind: i64,
    /// Its bytes.
    pub text: Vec<u8>,
}

fn table(name: &str) -> Result<Vec<Vec<i64>>> {
    fault::point();
    let path = format!("/proc/sysvipc/{name}");
    let text = fs::read_to_string(&path).map_err(|source| Error::new("read", &path, source))?;
    let row =
        |line: &str| line.split_whitespace().map(|word| word.parse().ok()).collect::<Option<Vec<i64>>>();
    text.lines()
        .skip(1)
        .map(|line| row(line).ok_or_else(|| Error::malformed("read", &path, format!("the line {line:?}"))))
        .collect()
}

fn column(row: &[i64], number: usize) -> i64 {
    row.get(number).copied().unwrap_or_default()
}

/// The mode is shown in octal digits.
fn permissions(row: &[i64], owner: usize) -> Permissions {
    let mode = u32::from_str_radix(&column(row, 2).to_string(), 8).unwrap_or_default();
    Permissions {
        key: column(row, 0) as i32,
        id: column(row, 1) as i32,
        mode: mode & 0o777,
        uid: column(row, owner) as u32,
        gid: column(row, owner + 1) as u32,
    }
}

/// All shared-memory segments.
pub fn segments() -> Result<Vec<Segment>> {
    let segment = |row: Vec<i64>| Segment {
        permissions: permissions(&row, 7),
        size: column(&row, 3) as u64,
        attached: column(&row, 6) as u64,
        removed: u32::from_str_radix(&column(&row, 2).to_string(), 8).unwrap_or_default() & SHM_DEST != 0,
    };
    Ok(table("shm")?.into_iter().map(segment).collect())
}

/// All sets of semaphores, with their values.
pub fn semaphores() -> Result<Vec<(Permissions, Vec<u16>)>> {
    let mut sets = Vec::new();
    for row in table("sem")? {
        let permissions = permissions(&row, 4);
        let mut values = vec![0_u16; column(&row, 3).clamp(0, 65_536) as usize];
        // SAFETY: GETALL writes as many 16-bit values as the set has, which is fixed.
        if unsafe { libc::semctl(permissions.id, 0, libc::GETALL, values.as_mut_ptr()) } < 0 {
            return Err(Error::last("semctl(GETALL)", format_args!("semaphores {}", permissions.id)));
        }
        sets.push((permissions, values));
    }
    Ok(sets)
}

/// All message queues: how many bytes each may hold, and its messages, which stay in it.
pub fn queues() -> Result<Vec<(Permissions, u64, Vec<Message>)>> {
    let mut queues = Vec::new();
    for row in table("msg")? {
        let permissions = permissions(&row, 7);
        // SAFETY: all fields of the structure are numbers; zeros are valid.
        let mut status: libc::msqid_ds = unsafe { std::mem::zeroed() };
        // SAFETY: IPC_STAT writes the live structure.
        if unsafe { libc::msgctl(permissions.id, libc::IPC_STAT, &raw mut status) } < 0 {
            return Err(Error::last("msgctl(IPC_STAT)", format_args!("message queue {}", permissions.id)));
        }
        let messages = (0..column(&row, 4)).map(|number| copy_message(permissions.id, number));
        queues.push((permissions, status.msg_qbytes, messages.collect::<Result<_>>()?));
    }
    Ok(queues)
}

fn copy_message(id: i32, number: i64) -> Result<Message> {
    let mut buffer = vec![0_u64; 1 + 8192 / 8];
    loop {
        let room = (buffer.len() - 1) * 8;
        let flags = MSG_COPY | libc::IPC_NOWAIT;
        // SAFETY: the buffer has room for the type and `room` bytes.
        let got = unsafe { libc::msgrcv(id, buffer.as_mut_ptr().cast(), room, number, flags) };
        if got >= 0 {
            let text: Vec<u8> =
                buffer.iter().skip(1).flat_map(|word| word.to_ne_bytes()).take(got as usize).collect();
            return Ok(Message { kind: buffer.first().map_or(0, |kind| *kind as i64), text });
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() == Some(libc::E2BIG) && room < MESSAGE_MAX {
            buffer.resize(buffer.len() * 4, 0);
            continue;
        }
        return Err(Error::new("msgrcv(MSG_COPY)", format_args!("message queue {id}"), error));
    }
}

fn next_id(kind: &str, id: i32) -> Result<()> {
    fault::point();
    let path = format!("/proc/sys/kernel/{kind}_next_id");
    fs::write(&path, id.to_string()).map_err(|source| Error::new("write", path, source))
}

/// The kernel takes another ID where the wanted one is taken; `remove` undoes that.
fn check_id(call: &'static str, got: i32, id: i32, remove: impl FnOnce(i32)) -> Result<()> {
    if got < 0 {
        return Err(Error::last(call, format_args!("System V object {id}")));
    }
    if got != id {
        remove(got);
        let taken = io::Error::new(io::ErrorKind::AlreadyExists, "another object has this ID here");
        return Err(Error::new(call, format_args!("System V object {id}"), taken));
    }
    Ok(())
}

const NEW: i32 = libc::IPC_CREAT | libc::IPC_EXCL;

/// Makes a segment, of zeros.
pub fn make_segment(permissions: Permissions, size: u64) -> Result<()> {
    next_id("shm", permissions.id)?;
    // SAFETY: takes numbers only.
    let got = unsafe { libc::shmget(permissions.key, size as usize, NEW | permissions.mode as i32) };
    check_id("shmget", got, permissions.id, |other| drop(remove_segment(other)))?;
    // SAFETY: all fields of the structure are numbers; zeros are valid.
    let mut status: libc::shmid_ds = unsafe { std::mem::zeroed() };
    status.shm_perm.uid = permissions.uid;
    status.shm_perm.gid = permissions.gid;
    status.shm_perm.mode = permissions.mode as _;
    // SAFETY: IPC_SET reads the live structure.
    if unsafe { libc::shmctl(permissions.id, libc::IPC_SET, &raw mut status) } < 0 {
        return Err(Error::last("shmctl(IPC_SET)", format_args!("segment {}", permissions.id)));
    }
    Ok(())
}

/// Removes a segment; it lives until nobody has it attached any more.
pub fn remove_segment(id: i32) -> Result<()> {
    fault::point();
    // SAFETY: IPC_RMID takes no structure.
    if unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) } < 0 {
        return Err(Error::last("shmctl(IPC_RMID)", format_args!("segment {id}")));
    }
    Ok(())
}

/// The file behind a segment of `size` bytes: its content can be read and written there without touching pages that
/// do not exist. Needs `CAP_CHECKPOINT_RESTORE` or `CAP_SYS_ADMIN`.
pub fn open_segment(id: i32, size: u64, writable: bool) -> Result<OwnedFd> {
    fault::point();
    let object = || format!("segment {id}");
    let flags = if writable { 0 } else { libc::SHM_RDONLY };
    // SAFETY: the kernel chooses an address where nothing is mapped; the mapping is never dereferenced.
    let start = unsafe { libc::shmat(id, std::ptr::null(), flags) };
    if start.addr() == usize::MAX {
        return Err(Error::last("shmat", object()));
    }
    let end = start.addr() + (size as usize).next_multiple_of(4096);
    let path = format!("/proc/self/map_files/{:x}-{end:x}", start.addr());
    let opened = fs::OpenOptions::new().read(true).write(writable).open(&path);
    // SAFETY: detaches exactly what was attached above, to which no reference exists.
    if unsafe { libc::shmdt(start) } < 0 {
        return Err(Error::last("shmdt", object()));
    }
    opened.map(Into::into).map_err(|error| Error::new("open", path, error))
}

/// Makes a set of semaphores with these values.
pub fn make_semaphores(permissions: Permissions, values: &[u16]) -> Result<()> {
    next_id("sem", permissions.id)?;
    // SAFETY: takes numbers only.
    let got = unsafe { libc::semget(permissions.key, values.len() as i32, NEW | permissions.mode as i32) };
    // SAFETY: IPC_RMID takes no structure.
    check_id("semget", got, permissions.id, |other| unsafe {
        libc::semctl(other, 0, libc::IPC_RMID);
    })?;
    // SAFETY: SETALL reads as many 16-bit values as the set has: those that it was made for.
    if unsafe { libc::semctl(permissions.id, 0, libc::SETALL, values.as_ptr()) } < 0 {
        return Err(Error::last("semctl(SETALL)", format_args!("semaphores {}", permissions.id)));
    }
    // SAFETY: all fields of the structure are numbers; zeros are valid.
    let mut status: libc::semid_ds = unsafe { std::mem::zeroed() };
    status.sem_perm.uid = permissions.uid;
    status.sem_perm.gid = permissions.gid;
    status.sem_perm.mode = permissions.mode as _;
    // SAFETY: IPC_SET reads the live structure.
    if unsafe { libc::semctl(permissions.id, 0, libc::IPC_SET, &raw mut status) } < 0 {
        return Err(Error::last("semctl(IPC_SET)", format_args!("semaphores {}", permissions.id)));
    }
    Ok(())
}

/// Makes a message queue that may hold `bytes`, with these messages.
pub fn make_queue(permissions: Permissions, bytes: u64, messages: &[Message]) -> Result<()> {
    next_id("msg", permissions.id)?;
    let object = || format!("message queue {}", permissions.id);
    // SAFETY: takes numbers only.
    let got = unsafe { libc::msgget(permissions.key, NEW | permissions.mode as i32) };
    // SAFETY: IPC_RMID takes no structure.
    check_id("msgget", got, permissions.id, |other| unsafe {
        libc::msgctl(other, libc::IPC_RMID, std::ptr::null_mut());
    })?;
    // SAFETY: all fields of the structure are numbers; zeros are valid.
    let mut status: libc::msqid_ds = unsafe { std::mem::zeroed() };
    status.msg_perm.uid = permissions.uid;
    status.msg_perm.gid = permissions.gid;
    status.msg_perm.mode = permissions.mode as _;
    status.msg_qbytes = bytes;
    // SAFETY: IPC_SET reads the live structure.
    if unsafe { libc::msgctl(permissions.id, libc::IPC_SET, &raw mut status) } < 0 {
        return Err(Error::last("msgctl(IPC_SET)", object()));
    }
    for message in messages {
        let mut buffer = message.kind.to_ne_bytes().to_vec();
        buffer.extend(&message.text);
        // SAFETY: the buffer is the type and as many bytes as said.
        let sent = unsafe {
            libc::msgsnd(permissions.id, buffer.as_ptr().cast(), message.text.len(), libc::IPC_NOWAIT)
        };
        if sent < 0 {
            return Err(Error::last("msgsnd", object()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use rustix::io::{pread, pwrite};

    use super::*;
    use crate::namespace::{self, Kind};

    #[test]
    fn objects_are_listed_and_made_again_with_their_ids() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let ids = |id| Permissions { key: 0x11, id, mode: 0o640, uid: 5, gid: 6 };
        let messages = [Message { kind: 3, text: b"one".to_vec() }, Message { kind: 1, text: vec![7; 5000] }];
        let make_and_list = || {
            make_segment(ids(40_005), 10_000)?;
            let file = open_segment(40_005, 10_000, true)?;
            pwrite(&file, b"content", 9_000).unwrap();
            let mut buffer = [0; 7];
            pread(open_segment(40_005, 10_000, false)?, &mut buffer, 9_000).unwrap();
            assert_eq!(buffer, *b"content");
            make_semaphores(ids(32_769), &[1, 2, 65])?;
            make_queue(ids(65_540), 9_000, &messages)?;
            assert!(make_segment(Permissions { key: 0x12, ..ids(40_005) }, 1).is_err(), "the ID is taken");
            let listed = (segments()?, semaphores()?, queues()?, queues()?);
            remove_segment(40_005)?;
            assert!(segments()?.iter().all(|segment| segment.permissions.id != 40_005));
            Ok::<_, Error>(listed)
        };
        let listed = std::thread::scope(|scope| {
            let inside = || {
                namespace::unshare(&[Kind::Ipc])?;
                make_and_list()
            };
            scope.spawn(inside).join().unwrap()
        });
        let (segments, semaphores, first, second) = listed.unwrap();
        let segment = Segment { permissions: ids(40_005), size: 10_000, attached: 0, removed: false };
        assert_eq!(segments.first(), Some(&segment));
        assert_eq!(semaphores, [(ids(32_769), vec![1, 2, 65])]);
        assert_eq!(first, [(ids(65_540), 9_000, messages.to_vec())]);
        assert_eq!(first, second, "looking takes nothing out");
    }
}
