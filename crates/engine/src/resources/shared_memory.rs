//! Memory objects that processes share: anonymous shared memory, memfds (memfd_create(2)), System V segments (shmget(2)), and files that have been
//! deleted while they were open or mapped.
//!
//! An object is one inode that no path leads to. Its pages are stored once, by offset, whoever maps it or
//! holds a descriptor of it. It is rebuilt in Limosa and given to the puppets as a descriptor to map.

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use limosa_image::{Checkpoint, Sink, SpaceId};
use limosa_kernel::namespace::{self, Kind};
use limosa_kernel::proc::Mapping;
use limosa_kernel::sysv::{self, Permissions};
use rustix::fs::{FallocateFlags, MemfdFlags, Mode, OFlags, ResolveFlags, SealFlags, SeekFrom};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::error::{CaptureError, RestoreError};
use crate::memory::SpaceAllocator;
use crate::view::ProcessView;

const BUFFER: usize = 256 * 1024;
const PAGE: u64 = 4096;
/// Largest object that is believed.
const SIZE_MAX: u64 = 1 << 46;

/// A shared-memory object.
#[derive(Debug, Serialize, Deserialize)]
pub struct SharedObject {
    /// What made it.
    pub kind: SharedKind,
    /// Bytes.
    pub size: u64,
    /// Where its pages are stored, by offset.
    pub space: SpaceId,
}

/// What made a shared-memory object.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SharedKind {
    /// mmap(2) with `MAP_SHARED | MAP_ANONYMOUS`.
    Anonymous,
    /// memfd_create(2).
    Memfd {
        /// Its name.
        name: serde_bytes::ByteBuf,
        /// `F_SEAL_*`
        seals: u32,
    },
    /// A file that has been deleted.
    Deleted {
        /// Its last path, whose directory tells the filesystem.
        path: serde_bytes::ByteBuf,
        /// Type and permissions, as in `st_mode`.
        mode: u32,
        /// Owner.
        uid: u32,
        /// Group.
        gid: u32,
    },
    /// shmget(2): a segment, made with its ID in the tree's IPC namespace.
    SystemV {
        /// The identifier.
        id: i32,
        /// The key by which it is found; 0 if none.
        key: i32,
        /// Permission bits.
        mode: u32,
        /// Owner.
        uid: u32,
        /// Group.
        gid: u32,
        /// Whether it ends with its last attachment (`IPC_RMID`).
        removed: bool,
    },
}

/// Whether a mapping's path is that of a System V segment, `/SYSV` and the key in hexadecimal digits.
pub fn is_segment(path: &[u8]) -> bool {
    path.strip_prefix(b"/SYSV").is_some_and(|key| key.len() == 8 && key.iter().all(u8::is_ascii_hexdigit))
}

/// Whether a mapping's path is that of a memory object rather than of a file.
pub fn is_shared_memory(path: &[u8]) -> bool {
    path.starts_with(b"/memfd:")
}

/// The objects of a tree while it is captured.
#[derive(Debug, Default)]
pub struct SharedObjects {
    by_inode: HashMap<(u64, u64), usize>,
    objects: Vec<SharedObject>,
    descriptors: Vec<OwnedFd>,
    /// IDs of the System V segments that are attached.
    attached: HashSet<i32>,
}

impl SharedObjects {
    /// Notes that `mapping` is (part of) a System V segment; gives the segment's ID, which is its inode number.
    pub fn attachment(&mut self, mapping: &Mapping) -> i32 {
        let id = mapping.inode as i32;
        self.attached.insert(id);
        id
    }

    /// Adds the System V segments that are attached somewhere in the tree; `all` adds every other segment in the IPC
    /// namespace of process `root`, too.
    pub fn add_segments(&mut self, root: i32, all: bool) -> Result<(), CaptureError> {
        if !all && self.attached.is_empty() {
            return Ok(());
        }
        let ipc = namespace::of_process(root, Kind::Ipc)?;
        let found = namespace::inside(&ipc, Kind::Ipc, || -> limosa_kernel::Result<Vec<_>> {
            let mut found = Vec::new();
            for segment in sysv::segments()? {
                if all || self.attached.contains(&segment.permissions.id) {
                    let file = sysv::open_segment(segment.permissions.id, segment.size, false)?;
                    found.push((segment, file));
                }
            }
            Ok(found)
        })?;
        for (segment, file) in found {
            let Permissions { key, id, mode, uid, gid } = segment.permissions;
            let kind = SharedKind::SystemV { id, key, mode, uid, gid, removed: segment.removed };
            self.objects.push(SharedObject { kind, size: segment.size, space: SpaceId(0) });
            self.descriptors.push(file);
        }
        Ok(())
    }

    /// The object that `mapping` shows.
    pub fn of_mapping(
        &mut self,
        process: &ProcessView,
        mapping: &Mapping,
        path: &[u8],
    ) -> Result<usize, CaptureError> {
        let link = format!("map_files/{:x}-{:x}", mapping.start, mapping.end);
        let file = process.proc.open_file(&link, OFlags::RDONLY)?;
        self.of_descriptor(process.pid, file, path)
    }

    /// The object behind `file`, a descriptor of ours; `path` is what the kernel calls it.
    pub fn of_descriptor(&mut self, pid: i32, file: OwnedFd, path: &[u8]) -> Result<usize, CaptureError> {
        let stat = rustix::fs::fstat(&file).map_err(CaptureError::io("fstat of shared memory", pid))?;
        if let Some(index) = self.by_inode.get(&(stat.st_dev, stat.st_ino)) {
            return Ok(*index);
        }
        let kind = match path.strip_prefix(b"/memfd:") {
            None if path == b"/dev/zero" => SharedKind::Anonymous,
            None => SharedKind::Deleted {
                path: path.to_vec().into(),
                mode: stat.st_mode,
                uid: stat.st_uid,
                gid: stat.st_gid,
            },
            Some(name) => SharedKind::Memfd {
                name: name.to_vec().into(),
                seals: rustix::fs::fcntl_get_seals(&file).map_or(0, |seals| seals.bits()),
            },
        };
        let index = self.objects.len();
        self.by_inode.insert((stat.st_dev, stat.st_ino), index);
        self.objects.push(SharedObject { kind, size: stat.st_size as u64, space: SpaceId(0) });
        self.descriptors.push(file);
        Ok(index)
    }

    /// Stores the content of all objects; returns them and the bytes stored.
    pub fn store(
        mut self,
        sink: &mut dyn Sink,
        spaces: &mut SpaceAllocator,
    ) -> Result<(Vec<SharedObject>, u64), CaptureError> {
        let mut buffer = vec![0; BUFFER];
        let mut stored = 0;
        for (object, file) in self.objects.iter_mut().zip(&self.descriptors) {
            object.space = spaces.next();
            stored += store_content(file.as_fd(), object, sink, &mut buffer)?;
        }
        Ok((self.objects, stored))
    }
}

fn store_content(
    file: BorrowedFd,
    object: &SharedObject,
    sink: &mut dyn Sink,
    buffer: &mut [u8],
) -> Result<u64, CaptureError> {
    let fail = |what| CaptureError::io(what, 0);
    let (mut position, mut stored) = (0, 0);
    loop {
        let data = match rustix::fs::seek(file, SeekFrom::Data(position)) {
            Ok(data) => data / PAGE * PAGE,
            Err(Errno::NXIO) => return Ok(stored),
            Err(errno) => return Err(fail("finding data of shared memory")(errno)),
        };
        let hole =
            rustix::fs::seek(file, SeekFrom::Hole(data)).map_err(fail("finding holes of shared memory"))?;
        position = data;
        while position < hole {
            let wanted = (hole - position).min(buffer.len() as u64) as usize;
            let got = rustix::io::pread(file, &mut buffer[..wanted], position)
                .map_err(fail("reading shared memory"))?;
            if got == 0 {
                return Ok(stored);
            }
            // The last page of an object whose size is not a multiple of pages.
            let whole = got.next_multiple_of(PAGE as usize);
            buffer[got..whole].fill(0);
            sink.pages(object.space, position, &buffer[..whole])?;
            stored += whole as u64;
            position += whole as u64;
        }
    }
}

impl SharedObject {
    /// Makes the object again, with its content; a deleted file below `root`, a segment in the namespace `ipc`.
    pub fn rebuild(
        &self,
        checkpoint: &Checkpoint,
        root: BorrowedFd,
        ipc: BorrowedFd,
    ) -> Result<OwnedFd, RestoreError> {
        if self.size > SIZE_MAX {
            return Err(RestoreError::inconsistent(format!("a shared-memory object of {} bytes", self.size)));
        }
        let fail = |step| RestoreError::rebuild("shared memory", step);
        let file = match &self.kind {
            SharedKind::Anonymous => limosa_kernel::memory::shared_anonymous(self.size)?,
            SharedKind::Memfd { name, .. } => {
                let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
                let file = rustix::fs::memfd_create(name.as_slice(), flags).map_err(fail("memfd_create"))?;
                rustix::fs::ftruncate(&file, self.size).map_err(fail("ftruncate"))?;
                file
            }
            SharedKind::Deleted { path, mode, uid, gid } => {
                let file = nameless(path, root)?;
                rustix::fs::ftruncate(&file, self.size).map_err(fail("ftruncate"))?;
                let owner = (rustix::fs::Uid::from_raw(*uid), rustix::fs::Gid::from_raw(*gid));
                rustix::fs::fchown(&file, Some(owner.0), Some(owner.1)).map_err(fail("fchown"))?;
                let permissions = Mode::from_raw_mode(mode & 0o7777);
                rustix::fs::fchmod(&file, permissions).map_err(fail("fchmod"))?;
                file
            }
            SharedKind::SystemV { id, key, mode, uid, gid, .. } => {
                let permissions = Permissions { key: *key, id: *id, mode: *mode, uid: *uid, gid: *gid };
                namespace::inside(ipc, Kind::Ipc, || make_segment(permissions, self.size))?
            }
        };
        let mut buffer = Vec::new();
        for extent in checkpoint.extents(self.space) {
            let mut done = 0;
            while done < extent.length {
                let length = (extent.length - done).min(limosa_image::CHUNK);
                buffer.resize(length as usize, 0);
                checkpoint.read_pages(extent, done..done + length, &mut buffer)?;
                let offset = extent.start + done;
                let inside = self.size.saturating_sub(offset).min(length) as usize;
                write_all(&file, &buffer[..inside], offset)?;
                done += length;
            }
        }
        if let SharedKind::Memfd { seals, .. } = &self.kind
            && *seals != 0
        {
            let seals = SealFlags::from_bits_retain(*seals);
            rustix::fs::fcntl_add_seals(&file, seals).map_err(fail("fcntl(F_ADD_SEALS)"))?;
        }
        Ok(file)
    }
}

/// Makes a segment in the IPC namespace of the calling thread. One that nobody has attached, with the same ID, key and
/// size, is what a tree in the host's namespaces left behind when it ended: its content is overwritten.
fn make_segment(permissions: Permissions, size: u64) -> Result<OwnedFd, RestoreError> {
    let id = permissions.id;
    let left = sysv::segments()?.into_iter().find(|segment| segment.permissions.id == id);
    match left {
        Some(left) if (left.permissions.key, left.size, left.attached) == (permissions.key, size, 0) => {
            let file = sysv::open_segment(id, size, true)?;
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&file, flags, 0, size)
                .map_err(RestoreError::rebuild(format!("System V segment {id}"), "fallocate"))?;
            Ok(file)
        }
        Some(_) => Err(RestoreError::Unsupported {
            what: format!("System V segment {id}"),
            why: "another one has its ID here; remove it (ipcrm -m), or end the processes that use it".into(),
        }),
        None => {
            sysv::make_segment(permissions, size)?;
            Ok(sysv::open_segment(id, size, true)?)
        }
    }
}

/// Marks the segments that end with their last attachment, now that they are attached.
pub(crate) fn remove_segments(objects: &[SharedObject], ipc: BorrowedFd) -> Result<(), RestoreError> {
    let removed = objects.iter().filter_map(|object| match object.kind {
        SharedKind::SystemV { id, removed: true, .. } => Some(id),
        _ => None,
    });
    let removed: Vec<i32> = removed.collect();
    if removed.is_empty() {
        return Ok(());
    }
    Ok(namespace::inside(ipc, Kind::Ipc, || removed.into_iter().try_for_each(sysv::remove_segment))?)
}

/// A new file without a name, where the deleted one was; in memory, if its directory is gone too or takes none.
fn nameless(path: &[u8], root: BorrowedFd) -> Result<OwnedFd, RestoreError> {
    let end = path.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
    let (directory, name) = (&path[..end.max(1)], &path[(end + 1).min(path.len())..]);
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    rustix::fs::openat2(root, directory, flags, Mode::RUSR | Mode::WUSR, ResolveFlags::IN_ROOT)
        .or_else(|_| rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC))
        .map_err(RestoreError::rebuild(String::from_utf8_lossy(path), "open(O_TMPFILE)"))
}

fn write_all(file: &OwnedFd, mut bytes: &[u8], mut offset: u64) -> Result<(), RestoreError> {
    while !bytes.is_empty() {
        let written = rustix::io::pwrite(file, bytes, offset)
            .map_err(RestoreError::rebuild("shared memory", "pwrite"))?;
        bytes = &bytes[written..];
        offset += written as u64;
    }
    Ok(())
}
