//! `/proc/PID/maps` and `/proc/PID/smaps`: the mappings of a process (`proc_pid_maps(5)`,
//! `fs/proc/task_mmu.c`).
//!
//! ```text
//! 7f00c0000000-7f00c0021000 rw-p 00000000 fe:00 1234     /path of the file (deleted)
//! start        end          prot offset   dev   inode    name
//! ```

use super::text::{self, ParseError, Parsed};

bitflags::bitflags! {
    /// Access to a mapping; the bits are those of `PROT_*`.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub struct Prot: u32 {
        /// `PROT_READ`
        const READ = 1;
        /// `PROT_WRITE`
        const WRITE = 2;
        /// `PROT_EXEC`
        const EXEC = 4;
    }
}

/// One mapping of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// First address after it.
    pub end: u64,
    /// Access.
    pub prot: Prot,
    /// Whether `MAP_SHARED`.
    pub shared: bool,
    /// Offset into the file in bytes; 0 for anonymous memory.
    pub offset: u64,
    /// Device of the file as (major, minor); (0, 0) for anonymous memory.
    pub dev: (u32, u32),
    /// Inode number of the file; 0 for anonymous memory.
    pub inode: u64,
    /// What the kernel calls it.
    pub name: MappingName,
    /// The flags of the kernel's `vm_area_struct`; only `smaps` has them.
    pub vm_flags: Option<VmFlags>,
    /// Protection key (`pkey_mprotect`); only `smaps` has it, on CPUs with protection keys.
    pub protection_key: Option<u32>,
    /// Page size in bytes (larger than the base page for hugetlbfs); only `smaps` has it.
    pub page_size: Option<u64>,
    /// Bytes of pages that others may have as well: `Shared_Clean`, `Shared_Dirty` and `Swap`; only `smaps` has it.
    pub maybe_shared: Option<u64>,
}

impl Mapping {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Whether it has no byte; a parsed mapping never is.
    pub fn is_empty(&self) -> bool {
        self.start >= self.end
    }
}

/// The name in the last column of `maps`.
///
/// The kernel writes paths as they are seen from the reader's root, and escapes only newlines: a file whose
/// own name ends in ` (deleted)` looks like a deleted one, and one with `\012` in its name like one with a
/// newline.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MappingName {
    /// No name: private anonymous memory.
    Anonymous,
    /// `[heap]`: contains the brk area.
    Heap,
    /// `[stack]`: contains the stack of the process's first thread.
    Stack,
    /// `[vdso]`
    Vdso,
    /// `[vvar]`
    Vvar,
    /// `[vvar_vclock]` (6.13)
    VvarVclock,
    /// `[vsyscall]`: not a mapping of the process; the same address everywhere.
    Vsyscall,
    /// `[anon:NAME]`: private anonymous memory named by `PR_SET_VMA_ANON_NAME`.
    AnonName(Vec<u8>),
    /// `[anon_shmem:NAME]`: shared anonymous memory named so (6.2).
    AnonShmemName(Vec<u8>),
    /// Anything else that is not a path: `[uprobes]`, `socket:[12]`, `anon_inode:[perf_event]`.
    Special(Vec<u8>),
    /// A path. memfds are `/memfd:NAME`, System V segments `/SYSV0000002a`, shared anonymous memory
    /// `/dev/zero`, all of them deleted.
    Path {
        /// The path, without the marker of deletion.
        path: Vec<u8>,
        /// Whether the kernel appended ` (deleted)`.
        deleted: bool,
    },
}

impl std::fmt::Display for MappingName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = |bytes| String::from_utf8_lossy(bytes);
        match self {
            Self::Anonymous => f.write_str("anonymous memory"),
            Self::Heap => f.write_str("[heap]"),
            Self::Stack => f.write_str("[stack]"),
            Self::Vdso => f.write_str("[vdso]"),
            Self::Vvar => f.write_str("[vvar]"),
            Self::VvarVclock => f.write_str("[vvar_vclock]"),
            Self::Vsyscall => f.write_str("[vsyscall]"),
            Self::AnonName(name) => write!(f, "[anon:{}]", text(name)),
            Self::AnonShmemName(name) => write!(f, "[anon_shmem:{}]", text(name)),
            Self::Special(name) => f.write_str(&text(name)),
            Self::Path { path, deleted } => {
                f.write_str(&text(path))?;
                if *deleted { f.write_str(" (deleted)") } else { Ok(()) }
            }
        }
    }
}

impl MappingName {
    /// What the last column says.
    pub fn parse(name: &[u8]) -> Self {
        match name {
            b"" => return Self::Anonymous,
            b"[heap]" => return Self::Heap,
            b"[stack]" => return Self::Stack,
            b"[vdso]" => return Self::Vdso,
            b"[vvar]" => return Self::Vvar,
            b"[vvar_vclock]" => return Self::VvarVclock,
            b"[vsyscall]" => return Self::Vsyscall,
            _ => {}
        }
        let bracketed = |prefix: &[u8]| name.strip_prefix(prefix).and_then(|rest| rest.strip_suffix(b"]"));
        if let Some(inner) = bracketed(b"[anon:") {
            return Self::AnonName(inner.to_vec());
        }
        if let Some(inner) = bracketed(b"[anon_shmem:") {
            return Self::AnonShmemName(inner.to_vec());
        }
        let plain = text::unescape(name, |byte| byte == b'\n').into_owned();
        if !plain.starts_with(b"/") {
            return Self::Special(plain);
        }
        match plain.strip_suffix(b" (deleted)") {
            Some(path) => Self::Path { path: path.to_vec(), deleted: true },
            None => Self::Path { path: plain, deleted: false },
        }
    }
}

/// Parses `/proc/PID/maps`.
pub fn parse_maps(file: &[u8]) -> Parsed<Vec<Mapping>> {
    // A line without a path has about 50 bytes, with the path of a library about 100.
    let mut mappings = Vec::with_capacity(file.len() / 64);
    for line in text::lines(file) {
        mappings.push(parse_mapping(line)?);
    }
    Ok(mappings)
}

/// Parses `/proc/PID/smaps`: a line of `maps` for each mapping, followed by `Key: value` lines.
pub fn parse_smaps(file: &[u8]) -> Parsed<Vec<Mapping>> {
    let mut mappings = Vec::new();
    for line in text::lines(file) {
        add_smaps_line(&mut mappings, line)?;
    }
    Ok(mappings)
}

/// Takes in one line of `smaps`: a mapping, or what it says about the last one.
pub(super) fn add_smaps_line(mappings: &mut Vec<Mapping>, line: &[u8]) -> Parsed<()> {
    // A key starts with a capital letter, a mapping with a lower-case hexadecimal digit.
    if !line.first().is_some_and(u8::is_ascii_uppercase) {
        mappings.push(parse_mapping(line)?);
        return Ok(());
    }
    let mapping = mappings.last_mut().ok_or_else(|| ParseError::new("mapping", line))?;
    // There are some 25 lines for each mapping: look no closer at those that are of no use.
    if !matches!(line.first(), Some(b'K' | b'P' | b'S' | b'V')) {
        return Ok(());
    }
    let (key, value) =
        text::key_value(line).ok_or_else(|| ParseError::new("attribute of a mapping", line))?;
    match key {
        b"VmFlags" => mapping.vm_flags = Some(VmFlags::parse(value)),
        b"ProtectionKey" => mapping.protection_key = Some(text::decimal(value, "ProtectionKey")?),
        b"KernelPageSize" => mapping.page_size = Some(bytes(value, "KernelPageSize")?),
        b"Shared_Clean" | b"Shared_Dirty" | b"Swap" => {
            let more = bytes(value, "shared or swapped pages")?;
            mapping.maybe_shared = Some(mapping.maybe_shared.unwrap_or(0).saturating_add(more));
        }
        _ => {}
    }
    Ok(())
}

/// `12 kB` in bytes.
fn bytes(value: &[u8], what: &'static str) -> Parsed<u64> {
    let kib = value.strip_suffix(b" kB").and_then(|number| text::unsigned(number, 10));
    kib.and_then(|kib| kib.checked_mul(1024)).ok_or_else(|| ParseError::new(what, value))
}

/// One line of `maps`.
pub(super) fn parse_mapping(line: &[u8]) -> Parsed<Mapping> {
    let mut rest = line;
    let mut next = |separator: u8, what| {
        let (field, tail) = text::split_once(rest, separator).ok_or_else(|| ParseError::new(what, line))?;
        rest = tail;
        Ok(field)
    };
    let start = text::hex(next(b'-', "start address")?, "start address")?;
    let end = text::hex(next(b' ', "end address")?, "end address")?;
    let (prot, shared) = permissions(next(b' ', "permissions")?)?;
    let offset = text::hex(next(b' ', "offset")?, "offset")?;
    let major = text::hex32(next(b':', "device")?, "device")?;
    let minor = text::hex32(next(b' ', "device")?, "device")?;
    // The kernel writes a space after the inode even when no name follows; be content without it.
    let (inode, name) = text::split_once(rest, b' ').unwrap_or((rest, b""));
    if start >= end {
        return Err(ParseError::new("end address", line));
    }
    let blanks = name.iter().take_while(|&&byte| byte == b' ').count();
    Ok(Mapping {
        start,
        end,
        prot,
        shared,
        offset,
        dev: (major, minor),
        inode: text::decimal(inode, "inode")?,
        name: MappingName::parse(name.get(blanks..).unwrap_or_default()),
        vm_flags: None,
        protection_key: None,
        page_size: None,
        maybe_shared: None,
    })
}

/// `rw-p` as access and whether shared.
fn permissions(field: &[u8]) -> Parsed<(Prot, bool)> {
    let bad = || ParseError::new("permissions", field);
    let &[read, write, exec, sharing] = field else { return Err(bad()) };
    let mut prot = Prot::empty();
    for (letter, expected, bit) in
        [(read, b'r', Prot::READ), (write, b'w', Prot::WRITE), (exec, b'x', Prot::EXEC)]
    {
        match letter {
            b'-' => {}
            letter if letter == expected => prot |= bit,
            _ => return Err(bad()),
        }
    }
    match sharing {
        b'p' => Ok((prot, false)),
        b's' => Ok((prot, true)),
        _ => Err(bad()),
    }
}

/// Names each flag of a mapping: the constant, its two letters in smaps, what it says.
macro_rules! vm_flags {
    ($($name:ident = $bit:literal, $letters:literal, $doc:literal;)*) => {
        bitflags::bitflags! {
            /// The `VmFlags` line of `smaps` (show_smap_vma_flags in fs/proc/task_mmu.c).
            ///
            /// The bits are this crate's own: the kernel's differ between versions and architectures.
            #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
            pub struct VmFlags: u64 {
                $(#[doc = $doc] const $name = 1 << $bit;)*
                /// Letters this version does not know were there.
                const UNKNOWN = 1 << 63;
            }
        }

        impl VmFlags {
            fn from_letters(letters: &[u8]) -> Self {
                $(if letters == $letters { return Self::$name; })*
                Self::UNKNOWN
            }
        }
    };
}

vm_flags! {
    READ = 0, b"rd", "Readable.";
    WRITE = 1, b"wr", "Writable.";
    EXEC = 2, b"ex", "Executable.";
    SHARED = 3, b"sh", "Shared.";
    MAY_READ = 4, b"mr", "mprotect may make it readable.";
    MAY_WRITE = 5, b"mw", "mprotect may make it writable.";
    MAY_EXEC = 6, b"me", "mprotect may make it executable.";
    MAY_SHARE = 7, b"ms", "Mapped with `MAP_SHARED` (also of a file opened read-only).";
    GROWS_DOWN = 8, b"gd", "Grows down on a fault below it: a stack, `MAP_GROWSDOWN`.";
    PFN_MAP = 9, b"pf", "Maps page frames without `struct page`: device memory.";
    LOCKED = 10, b"lo", "Locked in memory by mlock.";
    IO = 11, b"io", "Memory-mapped I/O.";
    SEQUENTIAL = 12, b"sr", "`MADV_SEQUENTIAL`";
    RANDOM = 13, b"rr", "`MADV_RANDOM`";
    DONT_COPY = 14, b"dc", "`MADV_DONTFORK`";
    DONT_EXPAND = 15, b"de", "mremap must not expand it.";
    LOCK_ON_FAULT = 16, b"lf", "Locked as it is faulted in: `MLOCK_ONFAULT` (named since 6.2).";
    ACCOUNT = 17, b"ac", "Accounted against the commit limit.";
    NO_RESERVE = 18, b"nr", "`MAP_NORESERVE`";
    HUGETLB = 19, b"ht", "hugetlbfs pages.";
    SYNC = 20, b"sf", "`MAP_SYNC`";
    ARCH_1 = 21, b"ar", "Architecture's own flag.";
    WIPE_ON_FORK = 22, b"wf", "`MADV_WIPEONFORK`";
    DONT_DUMP = 23, b"dd", "`MADV_DONTDUMP`";
    SOFT_DIRTY = 24, b"sd", "Soft-dirty as a whole: new since the bits were cleared.";
    MIXED_MAP = 25, b"mm", "Maps both pages and bare frames.";
    HUGE_PAGE = 26, b"hg", "`MADV_HUGEPAGE`";
    NO_HUGE_PAGE = 27, b"nh", "`MADV_NOHUGEPAGE`";
    MERGEABLE = 28, b"mg", "`MADV_MERGEABLE`";
    UFFD_MISSING = 29, b"um", "userfaultfd tracks missing pages.";
    UFFD_WP = 30, b"uw", "userfaultfd tracks writes.";
    UFFD_MINOR = 31, b"ui", "userfaultfd tracks minor faults.";
    SHADOW_STACK = 32, b"ss", "User shadow stack.";
    SEALED = 33, b"sl", "mseal (6.10).";
    DROPPABLE = 34, b"dp", "`MAP_DROPPABLE` (6.11).";
    MTE = 35, b"mt", "arm64 memory tagging.";
    BTI = 36, b"bt", "arm64 branch target identification.";
}

impl VmFlags {
    /// The flags that a `VmFlags` line names.
    pub fn parse(line: &[u8]) -> Self {
        let flags: Self = text::fields(line).map(Self::from_letters).collect();
        // Before 6.2 "lf" had no letters; of those without, a locked mapping can have no other.
        if flags.contains(Self::LOCKED) && text::fields(line).any(|letters| letters == b"??") {
            return flags.difference(Self::UNKNOWN) | Self::LOCK_ON_FAULT;
        }
        flags
    }
}
