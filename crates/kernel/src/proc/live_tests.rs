//! The readers against this process's own `/proc`, and against what the `procfs` crate reads there.

use procfs::process::{MMPermissions, MMapPath, Process};

use super::*;

fn myself() -> (ProcDir, Process) {
    (ProcDir::open(std::process::id() as i32).unwrap(), Process::myself().unwrap())
}

#[test]
fn stat_agrees_with_procfs() {
    let (dir, process) = myself();
    let (mine, theirs) = (dir.stat().unwrap(), process.stat().unwrap());
    assert_eq!(mine.pid, theirs.pid);
    assert_eq!(mine.comm, theirs.comm.as_bytes());
    assert_eq!(
        (mine.ppid, mine.pgrp, mine.session, mine.tty_nr),
        (theirs.ppid, theirs.pgrp, theirs.session, theirs.tty_nr)
    );
    assert_eq!((i64::from(mine.nice), mine.priority), (theirs.nice, theirs.priority));
    assert_eq!(mine.start_time, theirs.starttime);
    assert_eq!(
        (mine.start_code, mine.end_code, mine.start_stack),
        (theirs.startcode, theirs.endcode, theirs.startstack)
    );
    assert_eq!(
        [
            mine.start_data,
            mine.end_data,
            mine.start_brk,
            mine.arg_start,
            mine.arg_end,
            mine.env_start,
            mine.env_end
        ],
        [
            theirs.start_data,
            theirs.end_data,
            theirs.start_brk,
            theirs.arg_start,
            theirs.arg_end,
            theirs.env_start,
            theirs.env_end
        ]
        .map(Option::unwrap)
    );
    assert_eq!(Some(mine.exit_code), theirs.exit_code);
    assert_eq!((Some(mine.rt_priority), Some(mine.policy)), (theirs.rt_priority, theirs.policy));
}

#[test]
fn status_agrees_with_procfs() {
    let (dir, process) = myself();
    let (mine, theirs) = (dir.status().unwrap(), process.status().unwrap());
    assert_eq!((mine.pid, mine.tgid, mine.ppid, mine.tracer_pid), (theirs.pid, theirs.tgid, theirs.ppid, 0));
    assert_eq!(mine.umask, theirs.umask);
    assert_eq!(
        [mine.uid.real, mine.uid.effective, mine.uid.saved, mine.uid.fs],
        [theirs.ruid, theirs.euid, theirs.suid, theirs.fuid]
    );
    assert_eq!(mine.gid.fs, theirs.fgid);
    assert_eq!(Some(mine.ns_pid), theirs.nspid);
    assert_eq!(Some(mine.ns_sid), theirs.nssid);
    let signals = mine.signals;
    assert_eq!(
        [signals.blocked, signals.ignored, signals.caught],
        [theirs.sigblk, theirs.sigign, theirs.sigcgt]
    );
    assert_eq!(mine.signal_queue, theirs.sigq);
    let capabilities = mine.capabilities;
    assert_eq!(capabilities.effective, theirs.capeff);
    assert_eq!(Some(capabilities.bounding), theirs.capbnd);
    assert_eq!(Some(capabilities.ambient), theirs.capamb);
    assert_eq!(mine.seccomp, theirs.seccomp);
}

#[test]
fn maps_agree_with_procfs() {
    let (dir, process) = myself();
    // Threads of other tests map and unmap meanwhile: compare what both saw.
    let (mine, theirs) = (dir.maps().unwrap(), process.maps().unwrap());
    let mut compared = 0;
    for theirs in theirs {
        let Some(mine) = mine.iter().find(|mine| (mine.start, mine.end) == theirs.address) else { continue };
        assert_eq!((mine.offset, mine.inode), (theirs.offset, theirs.inode));
        assert_eq!((mine.dev.0 as i32, mine.dev.1 as i32), theirs.dev);
        assert_eq!(mine.prot.contains(Prot::WRITE), theirs.perms.contains(MMPermissions::WRITE));
        assert_eq!(mine.prot.contains(Prot::EXEC), theirs.perms.contains(MMPermissions::EXECUTE));
        assert_eq!(mine.shared, theirs.perms.contains(MMPermissions::SHARED));
        if let MMapPath::Path(path) = theirs.pathname {
            let path = path.into_os_string().into_encoded_bytes();
            assert_eq!(mine.name, MappingName::Path { path, deleted: false });
        }
        compared += 1;
    }
    assert!(compared > 10, "compared only {compared} mappings");
    let has = |name| mine.iter().any(|mapping| mapping.name == name);
    assert!(
        has(MappingName::Stack) && has(MappingName::Heap) && has(MappingName::Vdso) && has(MappingName::Vvar)
    );
}

#[test]
fn smaps_tell_flags_and_page_sizes() {
    let (dir, _) = myself();
    let mappings = dir.smaps().unwrap();
    let stack = mappings.iter().find(|mapping| mapping.name == MappingName::Stack).unwrap();
    let flags = stack.vm_flags.unwrap();
    assert!(flags.contains(VmFlags::READ | VmFlags::WRITE | VmFlags::GROWS_DOWN), "{flags:?}");
    assert_eq!(stack.page_size, Some(4096));
    for mapping in &mappings {
        assert!(!mapping.vm_flags.unwrap().contains(VmFlags::UNKNOWN), "{mapping:?}");
    }
}

#[test]
fn limits_mounts_and_small_files() {
    let (dir, process) = myself();
    let limits = dir.limits().unwrap();
    for (resource, limit) in limits.0.iter().enumerate() {
        let mut kernels = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: getrlimit fills the struct it is given.
        assert_eq!(unsafe { libc::getrlimit(resource as u32, &raw mut kernels) }, 0);
        assert_eq!(
            (limit.soft, limit.hard),
            (kernels.rlim_cur, kernels.rlim_max),
            "{}",
            Limits::NAMES[resource]
        );
    }

    let (mine, theirs) = (dir.mountinfo().unwrap(), process.mountinfo().unwrap().0);
    assert_eq!(mine.len(), theirs.len());
    for (mine, theirs) in mine.iter().zip(theirs) {
        assert_eq!((mine.id, mine.parent), (theirs.mnt_id, theirs.pid));
        assert_eq!(mine.point, theirs.mount_point.into_os_string().into_encoded_bytes());
        assert_eq!(mine.fs_type, theirs.fs_type.into_bytes());
        assert_eq!(format!("{}:{}", mine.dev.0, mine.dev.1), theirs.majmin);
    }

    let auxv = dir.auxv().unwrap();
    // SAFETY: getauxval takes a number and gives a number.
    let page_size = unsafe { libc::getauxval(libc::AT_PAGESZ) };
    assert!(auxv.contains(&(libc::AT_PAGESZ, page_size)));

    assert_eq!(dir.cwd().unwrap(), std::env::current_dir().unwrap().into_os_string().into_encoded_bytes());
    assert_eq!(dir.root().unwrap(), b"/");
    assert_eq!(dir.exe().unwrap(), std::env::current_exe().unwrap().into_os_string().into_encoded_bytes());
    assert_eq!(dir.comm().unwrap(), dir.stat().unwrap().comm);
    assert_eq!(
        dir.cmdline().unwrap().split(|&b| b == 0).next().unwrap(),
        std::env::args().next().unwrap().as_bytes()
    );
    assert!(dir.cgroup().unwrap().iter().all(|line| line.path.starts_with(b"/")));
    assert_eq!(dir.timens_offsets().unwrap(), TimensOffsets::default());
    assert_eq!(i32::from(process.oom_score_adj().unwrap()), dir.oom_score_adj().unwrap());
    assert_eq!(dir.loginuid().unwrap(), process.loginuid().unwrap());
    assert_eq!(dir.personality().unwrap(), 0);
    assert!(dir.coredump_filter().unwrap().is_some());
    match dir.timerslack_ns() {
        Ok(slack) => assert!(slack > 0),
        Err(error) => {
            assert_eq!(error.errno(), Some(libc::EPERM));
            assert_ne!(rustix::process::geteuid(), rustix::process::Uid::ROOT);
        }
    }
    for kind in NsKind::ALL {
        let link = dir.link(&format!("ns/{}", kind.name())).unwrap();
        let ino = dir.ns_id(kind).unwrap().ino;
        assert!(String::from_utf8(link).unwrap().ends_with(&format!(":[{ino}]")));
    }
}

#[test]
fn children_and_threads_are_listed() {
    let (dir, _) = myself();
    // A child of another thread than the first one.
    let mut child =
        std::thread::spawn(|| std::process::Command::new("sleep").arg("60").spawn().unwrap()).join().unwrap();
    let pid = child.id() as i32;
    let found = dir.children().unwrap().contains(&pid);
    let child_dir = ProcDir::open(pid).unwrap();
    let parent = child_dir.stat().unwrap().ppid;
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(found);
    assert_eq!(parent, std::process::id() as i32);
    let tid = rustix::thread::gettid().as_raw_nonzero().get();
    assert!(dir.tasks().unwrap().contains(&tid));
    assert_eq!(dir.task(tid).unwrap().status().unwrap().pid, tid);
    // The directory stays that of the ended process, whoever gets its number.
    assert!(child_dir.stat().unwrap_err().is_gone());
    assert!(ProcDir::open(pid).unwrap_err().is_gone());
}

#[test]
fn ids_in_a_nested_namespace_go_inwards() {
    if rustix::process::geteuid() != rustix::process::Uid::ROOT {
        return;
    }
    let mut outer = std::process::Command::new("unshare")
        .args(["--pid", "--fork", "--kill-child", "sleep", "60"])
        .spawn()
        .unwrap();
    let outer_dir = ProcDir::open(outer.id() as i32).unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    let inner = loop {
        if let [inner] = outer_dir.children().unwrap()[..] {
            break inner;
        }
        assert!(std::time::Instant::now() < deadline, "unshare started no child");
        std::thread::sleep(std::time::Duration::from_millis(1));
    };
    let inner_dir = ProcDir::open(inner).unwrap();
    let status = inner_dir.status().unwrap();
    let other_namespace = inner_dir.ns_id(NsKind::Pid).unwrap() != outer_dir.ns_id(NsKind::Pid).unwrap();
    // The inner one first: unshare reaps it, and ends.
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(inner).unwrap(),
        rustix::process::Signal::KILL,
    )
    .unwrap();
    outer.wait().unwrap();
    assert_eq!((status.pid, status.ns_pid, status.ns_tgid), (inner, vec![inner, 1], vec![inner, 1]));
    assert_eq!(status.ns_sid[1], 0, "the session leader is outside");
    assert!(other_namespace);
}

#[test]
fn a_zombie_has_no_memory() {
    let mut child = std::process::Command::new("true").spawn().unwrap();
    let dir = ProcDir::open(child.id() as i32).unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while dir.stat().unwrap().state != TaskState::Zombie {
        assert!(std::time::Instant::now() < deadline, "the child does not end");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    let status = dir.status().unwrap();
    // Kernels differ in whether such a file is empty or cannot be opened.
    let nothing_of = |result: crate::Result<usize>| match result {
        Ok(count) => count == 0,
        Err(error) => error.is_gone(),
    };
    let told = [
        nothing_of(dir.maps().map(|maps| maps.len())),
        nothing_of(dir.smaps().map(|maps| maps.len())),
        nothing_of(dir.auxv().map(|auxv| auxv.len())),
        nothing_of(dir.cmdline().map(|line| line.len())),
    ];
    let rest =
        (dir.coredump_filter().unwrap(), dir.timers().unwrap(), dir.exe().is_err(), dir.limits().is_ok());
    child.wait().unwrap();
    assert_eq!((status.state, status.umask, status.thp_enabled), (TaskState::Zombie, None, None));
    assert_eq!(told, [true; 4]);
    assert_eq!(rest, (None, vec![], true, true));
}
