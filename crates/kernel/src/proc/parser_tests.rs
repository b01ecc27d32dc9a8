//! The parsers against lines made up, by hand and at random.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// Feeds bytes to every parser; the results do not matter.
fn feed(bytes: &[u8]) {
    let _ = Stat::parse(bytes);
    let _ = Status::parse(bytes);
    let _ = parse_maps(bytes);
    let _ = parse_smaps(bytes);
    let _ = FdInfo::parse(bytes);
    let _ = parse_mountinfo(bytes);
    let _ = Limits::parse(bytes);
    let _ = parse_cgroup(bytes);
    let _ = parse_timers(bytes);
    let _ = parse_auxv(bytes);
    let _ = TimensOffsets::parse(bytes);
}

const MAPS: &str = "\
55d0c8a00000-55d0c8a21000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000001000 r-xs 00002000 fe:1f 123456                     /a b\\012c (deleted)
7f0000001000-7f0000002000 ---p 00000000 00:00 0 
7f0000002000-7f0000003000 rw-p 00000000 00:00 0                          [anon:glibc: malloc]
7f0000003000-7f0000004000 rw-s 00000000 00:01 77                         [anon_shmem:x]
7f0000004000-7f0000005000 rw-s 00000000 00:0f 9                          anon_inode:[perf_event]
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
";

#[test]
fn names_of_mappings() {
    let mappings = parse_maps(MAPS.as_bytes()).unwrap();
    let names: Vec<_> = mappings.iter().map(|mapping| mapping.name.clone()).collect();
    assert_eq!(
        names,
        [
            MappingName::Heap,
            MappingName::Path { path: b"/a b\nc".to_vec(), deleted: true },
            MappingName::Anonymous,
            MappingName::AnonName(b"glibc: malloc".to_vec()),
            MappingName::AnonShmemName(b"x".to_vec()),
            MappingName::Special(b"anon_inode:[perf_event]".to_vec()),
            MappingName::Vsyscall,
        ]
    );
    let file = &mappings[1];
    assert_eq!((file.prot, file.shared, file.len()), (Prot::READ | Prot::EXEC, true, 4096));
    assert_eq!((file.offset, file.dev, file.inode), (0x2000, (0xfe, 0x1f), 123_456));
}

#[test]
fn smaps_of_two_mappings() {
    let text = "\
7f0000000000-7f0000200000 rw-p 00000000 00:0f 5                          /anon_hugepage (deleted)
Size:               2048 kB
KernelPageSize:     2048 kB
VmFlags: rd wr mr mw me de ht dc 
ProtectionKey:         3
7f0000200000-7f0000201000 rw-p 00000000 00:00 0 
KernelPageSize:        4 kB
VmFlags: rd wr mr mw me lo zz 
";
    let mappings = parse_smaps(text.as_bytes()).unwrap();
    assert_eq!((mappings[0].page_size, mappings[0].protection_key), (Some(2 << 20), Some(3)));
    let flags = mappings[0].vm_flags.unwrap();
    assert!(flags.contains(VmFlags::HUGETLB | VmFlags::DONT_COPY | VmFlags::DONT_EXPAND));
    assert!(mappings[1].vm_flags.unwrap().contains(VmFlags::LOCKED | VmFlags::UNKNOWN));
    assert!(parse_smaps(b"Size: 4 kB\n").is_err(), "an attribute of nothing");
    assert_eq!(VmFlags::parse(b" lo ??"), VmFlags::LOCKED | VmFlags::LOCK_ON_FAULT, "as before Linux 6.2");
    assert_eq!(VmFlags::parse(b" rd ??"), VmFlags::READ | VmFlags::UNKNOWN);
}

#[test]
fn malformed_mappings_are_named() {
    for (text, what) in [
        ("nonsense", "start address"),
        ("2000-1000 r--p 0 0:0 0", "end address"),
        ("1000-2000 r-?p 0 0:0 0", "permissions"),
        ("1000-2000 r--x 0 0:0 0", "permissions"),
        ("1000-2000 r--p 0 0:100000000 0", "device"),
        ("1000-2000 r--p 0 0:0 x", "inode"),
        ("1000-10000000000000000 r--p 0 0:0 0", "end address"),
    ] {
        assert_eq!(parse_maps(text.as_bytes()).unwrap_err().what, what, "{text}");
    }
}

#[test]
fn a_name_may_look_like_the_rest_of_stat() {
    let numbers = " 1".repeat(49);
    let file = format!("42 (a) R 1\n(b) Z{numbers}\n");
    let stat = Stat::parse(file.as_bytes()).unwrap();
    assert_eq!((stat.pid, stat.comm.as_slice()), (42, b"a) R 1\n(b".as_slice()));
    assert_eq!((stat.state, stat.exit_code), (TaskState::Zombie, 1));
    assert!(Stat::parse(b"42 (a) R 1 1").is_err());
    assert!(Stat::parse(b")(").is_err());
}

#[test]
fn terminals_are_decoded_as_device_numbers() {
    let numbers = |tty: i32| format!("1 (x) S 1 1 1 {tty}{}", " 0".repeat(45));
    let tty = |number| Stat::parse(numbers(number).as_bytes()).unwrap().tty();
    assert_eq!(tty(0), None);
    assert_eq!(tty(34816 + 5), Some((136, 5)));
    assert_eq!(tty(0x0010_8807), Some((136, 263)));
}

#[test]
fn epoll_entries_with_blanks_after_the_label() {
    let file = b"pos:\t0\nflags:\t02000002\nmnt_id:\t15\nino:\t2080\n\
        tfd:        5 events:     1d data: ffffffffffffffff  pos:0 ino:61af sdev:7\n";
    let info = FdInfo::parse(file).unwrap();
    let entry = EpollEntry { fd: 5, events: 0x1d, data: u64::MAX, pos: 0, ino: 0x61af, sdev: 7 };
    assert_eq!((info.extra, info.flags), (FdExtra::Epoll(vec![entry]), 0o2_000_002));
}

#[test]
fn inotify_watches_with_and_without_handles() {
    let file = b"pos:\t0\nflags:\t00\n\
        inotify wd:2 ino:9e7e sdev:800013 mask:800afce ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:7e9e0000640d1b6d\n\
        inotify wd:1 ino:a111 sdev:800013 mask:800afce ignored_mask:0 \n\
        fanotify flags:10 event-flags:0\n";
    let info = FdInfo::parse(file).unwrap();
    let FdExtra::Inotify(watches) = info.extra else { panic!("{:?}", info.extra) };
    assert_eq!(
        watches[0].handle,
        Some(FileHandle { kind: 1, bytes: vec![0x7e, 0x9e, 0, 0, 0x64, 0x0d, 0x1b, 0x6d] })
    );
    assert_eq!((watches[1].wd, &watches[1].handle), (1, &None));
    assert_eq!(info.unknown, [b"fanotify flags:10 event-flags:0".to_vec()]);
    assert!(
        FdInfo::parse(b"pos:\t0\nflags:\t00\ninotify wd:2 ino:1 sdev:1 mask:1 fhandle-type:1 f_handle:7e9\n")
            .is_err()
    );
}

#[test]
fn leases_that_are_being_broken() {
    let file = b"pos:\t0\nflags:\t00\nlock:\t1: LEASE  BREAKING  UNLCK 77 08:01:99 0 EOF\n";
    let lock = FdInfo::parse(file).unwrap().locks[0];
    assert_eq!((lock.kind, lock.access, lock.breaking), (LockKind::Lease, LockAccess::Unlock, true));
    assert!(FdInfo::parse(b"pos:\t0\nflags:\t00\nlock:\t1: WHAT ADVISORY READ 7 08:01:99 0 EOF\n").is_err());
}

#[test]
fn mounts_with_escapes_and_tags() {
    let line = b"36 35 98:0 /mnt\\0401 /m\\134nt\\0112 rw,noatime shared:4 master:1 future:9 unbindable - fuse.x  rw,x=\\054\n";
    let mount = &parse_mountinfo(line).unwrap()[0];
    assert_eq!(
        (mount.root.as_slice(), mount.point.as_slice()),
        (b"/mnt 1".as_slice(), b"/m\\nt\t2".as_slice())
    );
    assert_eq!((mount.shared, mount.master, mount.unbindable), (Some(4), Some(1), true));
    assert_eq!(
        (mount.source.as_slice(), mount.super_options.as_slice()),
        (b"".as_slice(), b"rw,x=,".as_slice())
    );
    assert!(parse_mountinfo(b"36 35 98:0 / / rw shared:1").is_err());
}

#[test]
fn cgroups_of_both_versions() {
    let lines = parse_cgroup(b"9:name=a:b:/x\n4:cpu,cpuacct:/y:/z\n0::/\n").unwrap();
    assert_eq!(
        lines[0],
        CgroupLine { hierarchy: 9, controllers: b"name=a:b".to_vec(), path: b"/x".to_vec() }
    );
    assert_eq!(lines[1].path, b"/y:/z");
    assert_eq!(lines[2], CgroupLine { hierarchy: 0, controllers: vec![], path: b"/".to_vec() });
}

#[test]
fn timers_of_each_kind() {
    let file = b"ID: 1\nsignal: 60/00007fff86e452a8\nnotify: signal/pid.2634\nClockID: 0\n\
        ID: 2\nsignal: 32/0000000000000000\nnotify: thread/tid.7\nClockID: -6\n";
    let timers = parse_timers(file).unwrap();
    assert_eq!((timers[0].value, timers[0].to_thread, timers[0].target), (0x7fff_86e4_52a8, false, 2634));
    assert_eq!((timers[1].notify, timers[1].to_thread, timers[1].clock), (TimerNotify::Thread, true, -6));
    assert!(parse_timers(b"ID: 1\nsignal: 60/0\n").is_err());
}

#[test]
fn auxv_must_end() {
    let words = |words: &[u64]| words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<u8>>();
    assert_eq!(parse_auxv(&words(&[6, 4096, 3, 9, 0, 0, 5, 5])).unwrap(), [(6, 4096), (3, 9)]);
    assert!(parse_auxv(&words(&[6, 4096])).is_err());
    assert_eq!(parse_auxv(b"").unwrap(), []);
}

#[test]
fn time_namespace_offsets_may_be_negative() {
    let offsets =
        TimensOffsets::parse(b"monotonic       -5  999999999\nboottime      172800         0\n").unwrap();
    assert_eq!(offsets, TimensOffsets { monotonic: (-5, 999_999_999), boottime: (172_800, 0) });
    assert!(TimensOffsets::parse(b"monotonic 1 1\n").is_err());
}

/// A line of `maps` as the kernel prints the mapping.
fn print_mapping(mapping: &Mapping) -> Vec<u8> {
    let letter = |bit, letter| if mapping.prot.contains(bit) { letter } else { '-' };
    let mut line = format!(
        "{:08x}-{:08x} {}{}{}{} {:08x} {:02x}:{:02x} {} ",
        mapping.start,
        mapping.end,
        letter(Prot::READ, 'r'),
        letter(Prot::WRITE, 'w'),
        letter(Prot::EXEC, 'x'),
        if mapping.shared { 's' } else { 'p' },
        mapping.offset,
        mapping.dev.0,
        mapping.dev.1,
        mapping.inode
    )
    .into_bytes();
    if let MappingName::Path { path, deleted } = &mapping.name {
        line.resize(line.len().max(73), b' ');
        for &byte in path {
            if byte == b'\n' {
                line.extend(b"\\012");
            } else {
                line.push(byte);
            }
        }
        if *deleted {
            line.extend(b" (deleted)");
        }
    }
    line.push(b'\n');
    line
}

fn any_name() -> impl Strategy<Value = MappingName> {
    let byte = prop_oneof![Just(b'\n'), Just(b' '), Just(b'\\'), 1u8..];
    // A name that says itself that it is deleted, or holds the very escape, cannot be told apart.
    let ambiguous =
        |path: &Vec<u8>| path.ends_with(b" (deleted)") || path.windows(4).any(|four| four == b"\\012");
    let path = (vec(byte, 0..30), any::<bool>())
        .prop_map(|(tail, deleted)| ([b"/".as_slice(), &tail].concat(), deleted));
    prop_oneof![
        Just(MappingName::Anonymous),
        path.prop_filter("ambiguous", move |(path, _)| !ambiguous(path))
            .prop_map(|(path, deleted)| MappingName::Path { path, deleted }),
    ]
}

prop_compose! {
    fn any_mapping()(
        start in 0..u64::MAX,
        length in 1u64..1 << 40,
        prot in 0u32..8,
        shared: bool,
        offset: u64,
        dev: (u32, u32),
        inode: u64,
        name in any_name(),
    ) -> Mapping {
        let prot = Prot::from_bits_truncate(prot);
        let end = start.saturating_add(length);
        Mapping { start, end, prot, shared, offset, dev, inode, name, vm_flags: None, protection_key: None, page_size: None, maybe_shared: None }
    }
}

/// Fragments of the files' own language, so that random text gets past the first field.
fn fragments() -> impl Strategy<Value = Vec<u8>> {
    let words = [
        "pos:\t0\n",
        "flags:\t02\n",
        "tfd: ",
        "events:",
        "data:",
        "inotify ",
        "wd:1 ",
        "ino:",
        "sdev:",
        "mask:",
        "f_handle:",
        "fhandle-type:",
        "lock:\t",
        "1: POSIX ADVISORY WRITE ",
        "00:00:1 ",
        "EOF\n",
        "it_value: (",
        ", ",
        ")",
        "\n",
        " ",
        "\t",
        ":",
        "-",
        "0",
        "1",
        "ffffffffffffffff",
        "99999999999999999999",
        "(",
        "VmFlags:",
        "rd wr",
        "1000-2000 rw-p ",
        "00:00 ",
        "/x",
        " (deleted)",
        "\\012",
        "\\400",
        "\\",
        "ID: 1\n",
        "signal: 1/0\n",
        "notify: signal/pid.1\n",
        "ClockID: 0\n",
        "[anon:",
        "]",
        "1 1 0:1 / / rw - t s o\n",
        "Uid:\t0 0 0 0\n",
        "KernelPageSize: ",
        " kB\n",
        "eventfd-count: ",
        "sigmask:\t",
        "NSpid:\t",
        "Pid:\t",
    ];
    vec(proptest::sample::select(words.to_vec()), 0..40).prop_map(|words| words.concat().into_bytes())
}

proptest! {
    #[test]
    fn random_bytes_do_no_harm(bytes in vec(any::<u8>(), 0..300)) {
        feed(&bytes);
    }

    #[test]
    fn random_fragments_do_no_harm(text in fragments()) {
        feed(&text);
    }

    #[test]
    fn real_files_cut_and_damaged_do_no_harm(file in 0usize..9, cut: proptest::sample::Index, at: proptest::sample::Index, byte: u8) {
        let name = ["stat", "status", "maps", "smaps", "fdinfo/0", "mountinfo", "limits", "cgroup", "auxv"][file];
        let mut content = ProcDir::open(std::process::id() as i32).unwrap().read(name).unwrap();
        // Without any cgroup hierarchy that file is empty.
        prop_assume!(!content.is_empty());
        let at = at.index(content.len());
        content[at] = byte;
        content.truncate(cut.index(content.len()) + 1);
        feed(&content);
    }

    #[test]
    fn mappings_come_back(mappings in vec(any_mapping(), 0..20)) {
        let text: Vec<u8> = mappings.iter().flat_map(print_mapping).collect();
        prop_assert_eq!(parse_maps(&text).unwrap(), mappings);
    }

    #[test]
    fn names_in_stat_come_back(comm in vec(1u8.., 0..16), pid in 1i32.., numbers in vec(0u32..1000, 49)) {
        let numbers: Vec<String> = numbers.iter().map(u32::to_string).collect();
        let file = [pid.to_string().as_bytes(), b" (", &comm, b") S ", numbers.join(" ").as_bytes(), b"\n"].concat();
        let stat = Stat::parse(&file).unwrap();
        prop_assert_eq!((stat.pid, stat.comm), (pid, comm));
        prop_assert_eq!(stat.exit_code.to_string(), numbers[48].clone());
    }
}

/// How long it takes with as many mappings as a system lets a process have.
#[test]
#[ignore = "measures: run it alone, with --nocapture"]
fn figures_for_fifty_thousand_mappings() {
    use rustix::mm::{MapFlags, ProtFlags};
    const COUNT: usize = 50_000;
    // SAFETY: new mappings of our own that nobody refers to.
    let start = unsafe {
        rustix::mm::mmap_anonymous(std::ptr::null_mut(), COUNT * 4096, ProtFlags::READ, MapFlags::PRIVATE)
            .unwrap()
    };
    for page in (0..COUNT).step_by(2) {
        // SAFETY: within the mapping above; every other page gets another protection, so that mappings cannot
        // merge.
        unsafe {
            let page = start.cast::<u8>().add(page * 4096).cast();
            rustix::mm::mprotect(
                page,
                4096,
                rustix::mm::MprotectFlags::READ | rustix::mm::MprotectFlags::WRITE,
            )
            .unwrap();
        }
    }
    let dir = ProcDir::open(std::process::id() as i32).unwrap();
    for _ in 0..3 {
        let started = std::time::Instant::now();
        let content = dir.read("maps").unwrap();
        let read = started.elapsed();
        let mappings = parse_maps(&content).unwrap();
        println!(
            "maps: {} mappings, {} bytes: read {read:?}, all {:?}",
            mappings.len(),
            content.len(),
            started.elapsed()
        );
        let started = std::time::Instant::now();
        let bytes = dir.read("smaps").unwrap().len();
        println!("smaps: {bytes} bytes read in {:?}", started.elapsed());
        let started = std::time::Instant::now();
        assert!(dir.maps().unwrap().len() > COUNT);
        println!("maps: {:?}", started.elapsed());
        let started = std::time::Instant::now();
        let mappings = dir.smaps().unwrap().len();
        println!("smaps: {mappings} mappings: {:?}", started.elapsed());
    }
    // SAFETY: the mappings made above.
    unsafe { rustix::mm::munmap(start, COUNT * 4096).unwrap() };
}
