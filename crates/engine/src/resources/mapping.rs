//! Mappings of an address space: where, what of, and the advice given for them (mmap(2), madvise(2), mlock2(2)).

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use limosa_kernel::proc::{Mapping, MappingName, Prot, VmFlags};
use limosa_puppet::Program;
use serde::{Deserialize, Serialize};

use super::protection_keys::ProtectionKeys;
use super::segments::{self, Part};
use super::shared_memory::{SharedObjects, is_segment, is_shared_memory};
use super::vdso;
use crate::error::{CaptureError, Refusal, RestoreError};
use crate::view::ProcessView;

const PR_SET_VMA: i32 = 0x5356_4d41;
const MAP_FIXED_NOREPLACE: i32 = 0x10_0000;
const MLOCK_ONFAULT: i32 = 1;
/// Memory that the kernel may drop (Linux 6.11).
const MAP_DROPPABLE: i32 = 0x08;
/// Access is fatal from now on (Linux 6.13).
const MADV_GUARD_INSTALL: i32 = 102;

/// Advice that the kernel shows of a mapping, and the madvise(2) that gives it.
const ADVICE: [(VmFlags, i32); 8] = [
    (VmFlags::SEQUENTIAL, libc::MADV_SEQUENTIAL),
    (VmFlags::RANDOM, libc::MADV_RANDOM),
    (VmFlags::DONT_COPY, libc::MADV_DONTFORK),
    (VmFlags::DONT_DUMP, libc::MADV_DONTDUMP),
    (VmFlags::WIPE_ON_FORK, libc::MADV_WIPEONFORK),
    (VmFlags::HUGE_PAGE, libc::MADV_HUGEPAGE),
    (VmFlags::NO_HUGE_PAGE, libc::MADV_NOHUGEPAGE),
    (VmFlags::MERGEABLE, libc::MADV_MERGEABLE),
];

/// Flags of mappings that cannot be carried, and why.
const UNSUPPORTED: [(VmFlags, &str, &str); 6] = [
    (VmFlags::PFN_MAP, "it maps device memory", "close the device before the checkpoint"),
    (VmFlags::IO, "it maps device memory", "close the device before the checkpoint"),
    (VmFlags::HUGETLB, "it maps hugetlbfs pages", "use transparent huge pages (madvise) instead"),
    (VmFlags::UFFD_MISSING, "a userfaultfd serves it", "end the use of userfaultfd first"),
    (VmFlags::UFFD_MINOR, "a userfaultfd serves it", "end the use of userfaultfd first"),
    (VmFlags::SHADOW_STACK, "it is a shadow stack", "run the program without shadow stacks"),
];

/// A mapping.
#[derive(Debug, Serialize, Deserialize)]
pub struct MappingState {
    /// First address.
    pub start: u64,
    /// Bytes.
    pub length: u64,
    /// `PROT_*`
    pub protection: u32,
    /// What it shows.
    pub backing: Backing,
    /// `MAP_GROWSDOWN`, `MAP_NORESERVE`, `MAP_DROPPABLE`
    pub flags: i32,
    /// madvise(2) values in force.
    pub advice: Vec<i32>,
    /// mlock2(2) flags, if it is locked.
    pub locked: Option<i32>,
    /// Its name, given by `PR_SET_VMA_ANON_NAME`.
    pub name: Option<serde_bytes::ByteBuf>,
    /// Ranges in it whose access is fatal (`MADV_GUARD_INSTALL`): start and end.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub guards: Vec<(u64, u64)>,
    /// Whether mseal(2) forbids to change it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub sealed: bool,
    /// The key of pkeys(7) that guards it; none for key 0, and for the one that the kernel chooses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protection_key: Option<u32>,
}

/// What a mapping shows.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Backing {
    /// Private memory that starts as zeros.
    Anonymous,
    /// Memory shared between processes: index into the tree's shared objects, and offset in bytes.
    SharedMemory(usize, u64),
    /// A private view of memory that is shared otherwise, or of a deleted file: the same numbers.
    PrivateView(usize, u64),
    /// A System V segment, by its ID.
    SystemV(i32),
    /// A part of one, or one that is protected otherwise than shmat(2) does it.
    SystemVPart(Part),
    /// A file.
    File(MappedFile),
    /// The kernel's vDSO with its data pages; the number is a digest of its code.
    Vdso(u64),
}

/// A file that is mapped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MappedFile {
    /// Absolute path in the mount namespace.
    pub path: serde_bytes::ByteBuf,
    /// Offset in bytes.
    pub offset: u64,
    /// Whether writes go to the file.
    pub shared: bool,
    /// Whether the file must be opened for writing.
    pub writable: bool,
    /// Size of the file in bytes: another size is another file.
    pub size: u64,
}

/// Whether a key of pkey_mprotect(2) guards the mapping. One that may only be executed has a key that the kernel gives it.
fn is_keyed(mapping: &Mapping) -> bool {
    mapping.prot != Prot::EXEC && mapping.protection_key.is_some_and(|key| key != 0)
}

impl MappingState {
    /// One without flags, advice, locks or name.
    pub fn plain(start: u64, length: u64, protection: i32, backing: Backing) -> Self {
        Self {
            start,
            length,
            protection: protection as u32,
            backing,
            flags: 0,
            advice: Vec::new(),
            locked: None,
            name: None,
            guards: Vec::new(),
            sealed: false,
            protection_key: None,
        }
    }

    /// First address behind it.
    pub fn end(&self) -> u64 {
        self.start + self.length
    }

    /// Whether its pages are the process's own, so that their content is stored with the process.
    pub fn is_private(&self) -> bool {
        match &self.backing {
            Backing::Anonymous | Backing::PrivateView(..) => true,
            Backing::File(file) => !file.shared,
            Backing::SharedMemory(..) | Backing::SystemV(_) | Backing::SystemVPart(_) | Backing::Vdso(_) => {
                false
            }
        }
    }

    /// Whether its content need not come back: the kernel may turn it into zeros at any time. A restore always does,
    /// as fork(2) does to children: random numbers made of it must not be made twice.
    pub fn is_droppable(&self) -> bool {
        self.flags & MAP_DROPPABLE != 0
    }

    /// Whether absent pages read as zeros, so that pages of zeros need not be stored.
    pub fn starts_as_zeros(&self) -> bool {
        matches!(self.backing, Backing::Anonymous)
    }

    /// All mappings of a process that cannot be carried.
    pub(crate) fn refusals(process: &ProcessView, shared: &mut SharedObjects) -> Vec<Refusal> {
        let ordinary = |mapping: &&Mapping| mapping.name != MappingName::Vsyscall && !vdso::is_part(mapping);
        let mut sizes = FileSizes::default();
        let captured = process
            .mappings
            .iter()
            .filter(ordinary)
            .map(|one| Self::capture(process, one, shared, &mut sizes));
        let mut refusals = Vec::new();
        let mut states = Vec::new();
        for outcome in captured.chain([vdso::capture(process)]) {
            match outcome {
                Ok(state) => states.push(state),
                Err(CaptureError::Refused(refusal)) => refusals.push(*refusal),
                Err(_) => {}
            }
        }
        // The vDSO has come last, which makes no difference to segments.
        if let Err(CaptureError::Refused(refusal)) = refuse_collisions(process, &states) {
            refusals.push(*refusal);
        }
        refusals
    }

    /// Captures all mappings of a process.
    pub fn capture_all(process: &ProcessView, shared: &mut SharedObjects) -> Result<Vec<Self>, CaptureError> {
        let mut states: Vec<Self> = Vec::with_capacity(process.mappings.len());
        let mut sizes = FileSizes::default();
        for mapping in &process.mappings {
            match &mapping.name {
                MappingName::Vsyscall => {}
                // The kernel maps its data together with it.
                MappingName::Vdso => states.push(vdso::capture(process)?),
                _ if vdso::is_part(mapping) => {}
                _ => states.push(Self::capture(process, mapping, shared, &mut sizes)?),
            }
        }
        refuse_collisions(process, &states)?;
        Ok(states)
    }

    fn capture<'a>(
        process: &ProcessView,
        mapping: &'a Mapping,
        shared: &mut SharedObjects,
        sizes: &mut FileSizes<'a>,
    ) -> Result<Self, CaptureError> {
        let refuse = |reason, remedy| -> CaptureError {
            Refusal::mapping(process.pid, mapping.start, mapping.name.to_string(), reason, remedy).into()
        };
        let flags = mapping.vm_flags.unwrap_or(VmFlags::empty());
        if let Some((_, reason, remedy)) = UNSUPPORTED.iter().find(|(flag, ..)| flags.contains(*flag)) {
            return Err(refuse(reason, remedy));
        }
        let backing = match &mapping.name {
            // A private mapping of /dev/zero is anonymous; a shared one is of a nameless file of that name.
            MappingName::Path { path, deleted: false } if path == b"/dev/zero" => Backing::Anonymous,
            MappingName::Path { path, .. } if path == b"/[aio]" => {
                let remedy = "run the program without asynchronous I/O of the kernel's (io_setup)";
                return Err(refuse(
                    "it is the ring of io_setup(2), whose requests are in the kernel's hands",
                    remedy,
                ));
            }
            MappingName::Path { path, .. } if path == b"/secretmem" => {
                let remedy = "have the process unmap it (memfd_secret) before the checkpoint";
                return Err(refuse("it is secret memory, which nobody but its process may read", remedy));
            }
            // Its file has no name, so the kernel shows it as a deleted one.
            MappingName::Path { path, deleted: true } if is_segment(path) => {
                let id = shared.attachment(mapping);
                let size = sizes.of(process, mapping, path)?;
                let writable = flags.contains(VmFlags::MAY_WRITE);
                let whole = mapping.offset == 0 && Some(mapping.len()) == size.checked_next_multiple_of(4096);
                if whole && writable == mapping.prot.contains(Prot::WRITE) {
                    Backing::SystemV(id)
                } else {
                    Backing::SystemVPart(Part { id, offset: mapping.offset, size, writable })
                }
            }
            MappingName::Path { path, deleted } if *deleted || is_shared_memory(path) => {
                let object = shared.of_mapping(process, mapping, path)?;
                if flags.contains(VmFlags::MAY_SHARE) {
                    Backing::SharedMemory(object, mapping.offset)
                } else {
                    Backing::PrivateView(object, mapping.offset)
                }
            }
            MappingName::AnonShmemName(_) => {
                Backing::SharedMemory(shared.of_mapping(process, mapping, b"/dev/zero")?, mapping.offset)
            }
            MappingName::Path { path, .. } => {
                Backing::File(mapped_file(process, mapping, path, flags, sizes)?)
            }
            MappingName::Special(_) => {
                return Err(refuse("it maps something without a path", "close it first"));
            }
            _ => Backing::Anonymous,
        };
        let mut mapping_flags = 0;
        if flags.contains(VmFlags::GROWS_DOWN) {
            mapping_flags |= libc::MAP_GROWSDOWN;
        }
        if flags.contains(VmFlags::NO_RESERVE) {
            mapping_flags |= libc::MAP_NORESERVE;
        }
        if flags.contains(VmFlags::DROPPABLE) {
            mapping_flags |= MAP_DROPPABLE;
        }
        Ok(Self {
            start: mapping.start,
            length: mapping.len(),
            protection: mapping.prot.bits(),
            backing,
            flags: mapping_flags,
            advice: ADVICE
                .iter()
                .filter(|(flag, _)| flags.contains(*flag))
                .map(|(_, advice)| *advice)
                .collect(),
            locked: flags
                .contains(VmFlags::LOCKED)
                .then(|| if flags.contains(VmFlags::LOCK_ON_FAULT) { MLOCK_ONFAULT } else { 0 }),
            name: match &mapping.name {
                MappingName::AnonName(name) => Some(name.clone().into()),
                _ => None,
            },
            guards: Vec::new(),
            sealed: flags.contains(VmFlags::SEALED),
            protection_key: mapping.protection_key.filter(|_| is_keyed(mapping)),
        })
    }

    /// Adds the call that makes the mapping. `descriptor` is that of its file or object in the puppet; `writable`
    /// says that its pages will be written from outside before [`Self::finish`].
    pub fn map(&self, program: &mut Program, descriptor: Option<i32>, writable: bool) {
        let (kind, offset) = match &self.backing {
            Backing::SystemV(id) => {
                let may = |access: i32| self.protection & access as u32 != 0;
                segments::attach(program, *id, self.start, may(libc::PROT_WRITE), may(libc::PROT_EXEC));
                return;
            }
            // Attached before all mappings.
            Backing::SystemVPart(_) => return,
            Backing::Anonymous if self.is_droppable() && may_be_dropped() => {
                (MAP_DROPPABLE | libc::MAP_ANONYMOUS, 0)
            }
            Backing::Anonymous => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, 0),
            Backing::SharedMemory(_, offset) => (libc::MAP_SHARED, *offset),
            Backing::PrivateView(_, offset) => (libc::MAP_PRIVATE, *offset),
            Backing::File(file) => {
                (if file.shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE }, file.offset)
            }
            Backing::Vdso(_) => {
                vdso::map(self.start, program);
                return;
            }
        };
        let protection = if writable { self.protection | libc::PROT_WRITE as u32 } else { self.protection };
        let arguments = [
            self.start.into(),
            self.length.into(),
            protection.into(),
            (kind | self.flags & !MAP_DROPPABLE | MAP_FIXED_NOREPLACE).into(),
            descriptor.unwrap_or(-1).into(),
            offset.into(),
        ];
        program.call("make a mapping", libc::SYS_mmap, arguments);
    }

    /// Adds what comes after the pages: final protection, advice, name, locking.
    pub fn finish(&self, program: &mut Program, was_writable: bool) {
        let (start, length) = (self.start, self.length);
        let is_part = matches!(self.backing, Backing::SystemVPart(_));
        if is_part || was_writable && self.protection & libc::PROT_WRITE as u32 == 0 {
            let arguments = [start.into(), length.into(), self.protection.into()];
            program.call("set a mapping's protection", libc::SYS_mprotect, arguments);
        }
        for advice in &self.advice {
            program.call(
                "advise on a mapping",
                libc::SYS_madvise,
                [start.into(), length.into(), (*advice).into()],
            );
        }
        if let Some(name) = &self.name {
            let name = program.string(name);
            let arguments = [PR_SET_VMA.into(), 0.into(), start.into(), length.into(), name.into()];
            // Only a label, and only with CONFIG_ANON_VMA_NAME.
            program.try_call("name a mapping", libc::SYS_prctl, arguments);
        }
        for (start, end) in &self.guards {
            let arguments = [(*start).into(), end.saturating_sub(*start).into(), MADV_GUARD_INSTALL.into()];
            program.call("guard a part of a mapping", libc::SYS_madvise, arguments);
        }
        if let Some(flags) = self.locked {
            let arguments = [start.into(), length.into(), flags.into()];
            if self.guards.is_empty() {
                program.call("lock a mapping", libc::SYS_mlock2, arguments);
            } else {
                // It locks the mapping, and then fails to fault in what is guarded, as it did for the program.
                program.try_call("lock a mapping", libc::SYS_mlock2, arguments);
            }
        }
    }

    /// Adds the call that gives it its key, which may forbid its own process to touch it.
    pub fn lock_up(&self, program: &mut Program) {
        if let Some(key) = self.protection_key {
            let arguments = [self.start.into(), self.length.into(), self.protection.into(), key.into()];
            program.call("give a mapping its protection key", libc::SYS_pkey_mprotect, arguments);
        }
    }

    /// Adds the call after which nothing about the mapping can be changed any more.
    pub fn seal(&self, program: &mut Program) {
        if self.sealed {
            let arguments = [self.start.into(), self.length.into(), 0.into()];
            program.call("seal a mapping", libc::SYS_mseal, arguments);
        }
    }
}

/// Refuses parts of System V segments that cannot be attached one after the other.
fn refuse_collisions(process: &ProcessView, states: &[MappingState]) -> Result<(), CaptureError> {
    let Err(part) = segments::attachments(states) else { return Ok(()) };
    let (reason, remedy) =
        ("another segment is attached where more of it would be", "detach it (shmdt) before the checkpoint");
    Err(Refusal::mapping(process.pid, part.start, "part of a System V segment".into(), reason, remedy).into())
}

/// Whether this kernel knows memory that may be dropped. Where it does not, that memory is an ordinary one, which the
/// advice that goes with it still keeps from children and dumps.
fn may_be_dropped() -> bool {
    static KNOWN: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *KNOWN.get_or_init(|| limosa_kernel::probe::droppable_memory().is_ok())
}

/// Sizes of mapped files: a library is mapped in five parts. By device, inode and path, because overlayfs may show one
/// number for files of different layers.
#[derive(Default)]
struct FileSizes<'a>(HashMap<MappedInode<'a>, u64>);

type MappedInode<'a> = ((u32, u32), u64, &'a [u8]);

impl<'a> FileSizes<'a> {
    fn of(&mut self, process: &ProcessView, mapping: &Mapping, path: &'a [u8]) -> Result<u64, CaptureError> {
        let file = (mapping.dev, mapping.inode, path);
        if let Some(size) = self.0.get(&file) {
            return Ok(*size);
        }
        let link = format!("map_files/{:x}-{:x}", mapping.start, mapping.end);
        let opened = process.proc.open_file(&link, rustix::fs::OFlags::PATH)?;
        let stat =
            rustix::fs::fstat(&opened).map_err(CaptureError::io("fstat of a mapped file", process.pid))?;
        if is_hidden(process, path, &stat) {
            let reason = "another file is at its path now: something is mounted over it";
            let remedy = "unmount what hides it, or have the process map it anew";
            let name = mapping.name.to_string();
            return Err(Refusal::mapping(process.pid, mapping.start, name, reason, remedy).into());
        }
        let size = stat.st_size as u64;
        self.0.insert(file, size);
        Ok(size)
    }
}

/// Whether the path of a mapped file leads to another one. (One that was replaced by rename(2) is deleted.) Not asked of
/// processes whose root is another than their mount namespace's: paths are shown from that.
fn is_hidden(process: &ProcessView, path: &[u8], mapped: &rustix::fs::Stat) -> bool {
    let root = format!("/proc/{}/root", process.pid);
    if std::fs::read_link(&root).is_ok_and(|root| root != Path::new("/")) {
        return false;
    }
    let inside = OsStr::from_bytes(path.strip_prefix(b"/").unwrap_or(path));
    rustix::fs::lstat(Path::new(&root).join(inside))
        .is_ok_and(|found| (found.st_dev, found.st_ino) != (mapped.st_dev, mapped.st_ino))
}

fn mapped_file<'a>(
    process: &ProcessView,
    mapping: &Mapping,
    path: &'a [u8],
    flags: VmFlags,
    sizes: &mut FileSizes<'a>,
) -> Result<MappedFile, CaptureError> {
    // A shared mapping that mprotect may still make writable was made of a file open for writing.
    let shared = flags.contains(VmFlags::MAY_SHARE);
    let writable = shared && flags.contains(VmFlags::MAY_WRITE) && mapping.shared;
    Ok(MappedFile {
        path: path.to_vec().into(),
        offset: mapping.offset,
        shared,
        writable,
        size: sizes.of(process, mapping, path)?,
    })
}

/// Checks that mappings from a checkpoint are ones that a process can have.
pub fn check(mappings: &[MappingState], keys: ProtectionKeys) -> Result<(), RestoreError> {
    const TASK_SIZE: u64 = 0x7fff_ffff_f000;
    let mut free_from = 0;
    for mapping in mappings {
        let end = mapping.start.checked_add(mapping.length).filter(|end| *end <= TASK_SIZE);
        let aligned = mapping.start % 4096 == 0 && mapping.length % 4096 == 0 && mapping.length > 0;
        match end {
            Some(end) if aligned && mapping.start >= free_from && guards_fit(mapping) => free_from = end,
            _ => {
                let what = format!("mapping at {:#x} of {:#x} bytes", mapping.start, mapping.length);
                return Err(RestoreError::inconsistent(what));
            }
        }
        if mapping.protection_key.is_some_and(|key| !keys.has(key)) {
            let what = format!("mapping at {:#x} with a protection key that is not taken", mapping.start);
            return Err(RestoreError::inconsistent(what));
        }
    }
    segments::attachments(mappings).map(drop).map_err(|part| {
        RestoreError::inconsistent(format!("the part of a System V segment at {:#x}", part.start))
    })
}

/// Whether guard regions lie in their mapping.
fn guards_fit(mapping: &MappingState) -> bool {
    mapping.guards.iter().all(|(start, end)| mapping.start <= *start && start < end && *end <= mapping.end())
}
