//! Scans of this process's own memory, by the ioctl and by the words of the file, which must agree.

use std::os::fd::AsRawFd;
use std::time::Instant;

use linux_raw_sys::general::{UFFD_API, UFFD_FEATURE_WP_ASYNC, uffdio_api, uffdio_range, uffdio_register};
use linux_raw_sys::ioctl::{UFFDIO_API, UFFDIO_REGISTER};
use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::*;

const PAGE: u64 = 4096;

/// A mapping of this process, unmapped in the end.
struct Area {
    start: *mut u8,
    pages: u64,
}

impl Area {
    fn anonymous(pages: u64) -> Self {
        let length = (pages * PAGE) as usize;
        // SAFETY: a new mapping where the kernel likes.
        let start = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        };
        let area = Self { start: start.unwrap().cast(), pages };
        area.advise(Advice::LinuxNoHugepage);
        area
    }

    fn of_file(file: &impl std::os::fd::AsFd, pages: u64, flags: MapFlags) -> Self {
        let length = (pages * PAGE) as usize;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping where the kernel likes.
        let start = unsafe { rustix::mm::mmap(std::ptr::null_mut(), length, access, flags, file, 0) };
        Self { start: start.unwrap().cast(), pages }
    }

    fn advise(&self, advice: Advice) {
        // SAFETY: advice on our own mapping that keeps its content.
        unsafe { rustix::mm::madvise(self.start.cast(), (self.pages * PAGE) as usize, advice) }.unwrap();
    }

    fn write(&self, page: u64) {
        assert!(page < self.pages);
        // SAFETY: within the mapping, which nothing else refers to.
        unsafe { self.start.add((page * PAGE) as usize).write_volatile(7) };
    }

    fn read(&self, page: u64) -> u8 {
        assert!(page < self.pages);
        // SAFETY: within the mapping, which nothing else refers to.
        unsafe { self.start.add((page * PAGE) as usize).read_volatile() }
    }

    fn range(&self) -> Range<u64> {
        let start = self.start as u64;
        start..start + self.pages * PAGE
    }

    /// Runs as page numbers in the area.
    fn pages_of(&self, runs: &[PageRun]) -> Vec<(u64, u64)> {
        let number = |address: u64| (address - self.start as u64) / PAGE;
        runs.iter().map(|run| (number(run.start), number(run.end))).collect()
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: our own mapping, of which no reference is left.
        unsafe { rustix::mm::munmap(self.start.cast(), (self.pages * PAGE) as usize) }.unwrap();
    }
}

fn scanner() -> PagemapScanner {
    PagemapScanner::open(&ProcDir::open(std::process::id() as i32).unwrap()).unwrap()
}

/// One scanner of each way that this kernel offers.
fn scanners() -> Vec<PagemapScanner> {
    let mut words = scanner();
    words.use_words();
    let own = scanner();
    if own.has_scan() { vec![own, words] } else { vec![words] }
}

fn sees_frames() -> bool {
    words::zero_frame().is_some()
}

/// All populated pages, found alike in every way.
fn populated(area: &Area) -> Vec<(u64, u64)> {
    let mut found: Vec<_> = scanners()
        .iter_mut()
        .map(|scanner| area.pages_of(&scanner.populated(area.range()).unwrap()))
        .collect();
    let first = found.remove(0);
    for other in found {
        assert_same(&first, &other);
    }
    first
}

/// Compares run by run, to name the first that differs and not print thousands.
fn assert_same(left: &[(u64, u64)], right: &[(u64, u64)]) {
    let differs = left.iter().zip(right).position(|(left, right)| left != right);
    if let Some(at) = differs {
        panic!("run {at} of {} and {}: {:?} and {:?}", left.len(), right.len(), left[at], right[at]);
    }
    let common = left.len().min(right.len());
    assert_eq!((left.get(common), left.last()), (right.get(common), right.last()), "runs {common} and last");
}

/// The categories of one page, in every way.
fn categories_of(area: &Area, page: u64) -> Vec<Categories> {
    let all = Categories::PRESENT | Categories::FILE | Categories::ZERO;
    let filter = Filter { any_of: Categories::PRESENT, report: all, ..Filter::OWN_DATA };
    let filter = Filter { none_of: Categories::empty(), ..filter };
    let start = area.range().start + page * PAGE;
    scanners()
        .iter_mut()
        .map(|scanner| {
            let mut runs = Vec::new();
            scanner.scan(start..start + PAGE, &filter, &mut runs).unwrap();
            assert!(runs.len() <= 1);
            runs.first().map_or(Categories::empty(), |run| run.categories)
        })
        .collect()
}

#[test]
fn only_written_pages_are_populated() {
    let area = Area::anonymous(16);
    assert_eq!(populated(&area), []);
    for page in [1, 2, 5, 15] {
        area.write(page);
    }
    let anonymous = scanner().populated_anonymous(area.range()).unwrap();
    assert_eq!(area.pages_of(&anonymous), [(1, 3), (5, 6), (15, 16)]);
    assert_eq!(populated(&area), [(1, 3), (5, 6), (15, 16)]);
}

#[test]
fn the_zero_page_is_not_populated() {
    let area = Area::anonymous(8);
    area.write(0);
    assert_eq!(area.read(3), 0);
    if sees_frames() {
        assert_eq!(populated(&area), [(0, 1)]);
        for categories in categories_of(&area, 3) {
            assert_eq!(categories, Categories::PRESENT | Categories::ZERO);
        }
    }
    let mut scanner = scanner();
    if scanner.has_scan() {
        assert_eq!(area.pages_of(&scanner.populated(area.range()).unwrap()), [(0, 1)]);
    }
}

#[test]
fn of_a_private_file_mapping_only_modified_pages_are_populated() {
    let file = tempfile::tempfile().unwrap();
    rustix::io::write(&file, &vec![1; 8 * PAGE as usize]).unwrap();
    let area = Area::of_file(&file, 8, MapFlags::PRIVATE);
    let sum: u32 = (0..8).map(|page| u32::from(area.read(page))).sum();
    assert_eq!(sum, 8);
    assert_eq!(populated(&area), []);
    area.write(2);
    area.write(7);
    assert_eq!(populated(&area), [(2, 3), (7, 8)]);
    for categories in categories_of(&area, 4) {
        assert_eq!(categories, Categories::PRESENT | Categories::FILE);
    }
}

#[test]
fn shared_memory_is_the_memory_objects_and_not_populated() {
    let memfd = rustix::fs::memfd_create("pagemap-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&memfd, 8 * PAGE).unwrap();
    let area = Area::of_file(&memfd, 8, MapFlags::SHARED);
    area.write(1);
    assert_eq!(populated(&area), []);
    for categories in categories_of(&area, 1) {
        assert_eq!(categories, Categories::PRESENT | Categories::FILE);
    }
    // A private mapping of it owns what it wrote.
    let private = Area::of_file(&memfd, 8, MapFlags::PRIVATE);
    assert_eq!(private.read(1), 7);
    private.write(3);
    assert_eq!(populated(&private), [(3, 4)]);
}

#[test]
fn huge_pages_are_one_run() {
    const HUGE: u64 = 512;
    let area = Area::anonymous(3 * HUGE);
    area.advise(Advice::LinuxHugepage);
    let first = (area.range().start / PAGE).next_multiple_of(HUGE) - area.range().start / PAGE;
    area.write(first);
    // No huge page may have been free.
    let is_huge = std::fs::read_to_string("/proc/self/smaps")
        .unwrap()
        .lines()
        .any(|line| line.strip_prefix("AnonHugePages:").is_some_and(|kib| kib.trim() == "2048 kB"));
    let mut scanner = scanner();
    if scanner.has_scan() {
        let runs = scanner.populated(area.range()).unwrap();
        assert_eq!(runs.len(), 1);
        assert_eq!(runs[0].categories.contains(Categories::HUGE), is_huge);
    }
    assert_eq!(populated(&area), [(first, first + if is_huge { HUGE } else { 1 })]);
}

#[test]
fn guard_regions_are_not_populated() {
    const MADV_GUARD_INSTALL: i32 = 102;
    let area = Area::anonymous(8);
    area.write(1);
    area.write(4);
    // SAFETY: takes pages 4 and 5 out of our own mapping; nothing touches them afterwards.
    let result = unsafe {
        libc::madvise(area.start.add(4 * PAGE as usize).cast(), 2 * PAGE as usize, MADV_GUARD_INSTALL)
    };
    let mut scanner = scanner();
    if result == 0 && scanner.known.contains(Categories::GUARD) {
        assert_eq!(populated(&area), [(1, 2)]);
        let guards = Filter {
            all_of: Categories::GUARD,
            none_of: Categories::empty(),
            any_of: Categories::empty(),
            report: Categories::GUARD,
        };
        let mut runs = Vec::new();
        scanner.scan(area.range(), &guards, &mut runs).unwrap();
        assert_eq!(area.pages_of(&runs), [(4, 6)]);
    }
}

#[test]
fn more_runs_than_the_buffer_holds() {
    let pages = 4 * REGIONS as u64;
    let area = Area::anonymous(pages);
    for page in (0..pages).step_by(2) {
        area.write(page);
    }
    let expected: Vec<_> = (0..pages).step_by(2).map(|page| (page, page + 1)).collect();
    assert_same(&populated(&area), &expected);
}

#[test]
fn one_scan_of_the_whole_address_space_finds_the_same() {
    let area = Area::anonymous(64);
    area.write(10);
    let mut scanner = scanner();
    if scanner.has_scan() {
        let runs = scanner.populated(0..0x7fff_ffff_f000).unwrap();
        assert!(runs.windows(2).all(|pair| pair[0].end <= pair[1].start));
        let address = area.range().start + 10 * PAGE;
        assert!(runs.iter().any(|run| run.start <= address && address < run.end));
    }
}

/// A userfaultfd that tracks writes to the area; closing it ends that.
fn track_writes(area: &Area) -> Option<OwnedFd> {
    // Anybody may have one for faults of user mode.
    let flags = rustix::mm::UserfaultfdFlags::CLOEXEC | rustix::mm::UserfaultfdFlags::from_bits_retain(1);
    // SAFETY: the descriptor is only used to write-protect an area of this test.
    let uffd = unsafe { rustix::mm::userfaultfd(flags) }.unwrap();
    let mut api =
        uffdio_api { api: u64::from(UFFD_API), features: u64::from(UFFD_FEATURE_WP_ASYNC), ioctls: 0 };
    let range = uffdio_range { start: area.start as u64, len: area.pages * PAGE };
    let mut register = uffdio_register { range, mode: 2, ioctls: 0 };
    // SAFETY: both ioctls read and write the structs they are given.
    unsafe {
        if libc::ioctl(uffd.as_raw_fd(), libc::Ioctl::from(UFFDIO_API), &raw mut api) != 0 {
            return None;
        }
        assert_eq!(libc::ioctl(uffd.as_raw_fd(), libc::Ioctl::from(UFFDIO_REGISTER), &raw mut register), 0);
    }
    Some(uffd)
}

#[test]
fn writes_since_the_last_scan_are_found() {
    let area = Area::anonymous(16);
    for page in 0..8 {
        area.write(page);
    }
    let mut scanner = scanner();
    let mut runs = Vec::new();
    if !scanner.has_scan() {
        let error = scanner.scan_and_protect(area.range(), &Filter::OWN_WRITTEN, &mut runs).unwrap_err();
        assert_eq!(error.errno(), Some(libc::ENOTTY));
        return;
    }
    let error = scanner.scan_and_protect(area.range(), &Filter::OWN_WRITTEN, &mut runs).unwrap_err();
    assert_eq!(error.errno(), Some(libc::EPERM), "no userfaultfd watches the area");

    let Some(_uffd) = track_writes(&area) else { return };
    let mut written = |protecting: bool| {
        let mut runs = Vec::new();
        if protecting {
            scanner.scan_and_protect(area.range(), &Filter::OWN_WRITTEN, &mut runs).unwrap();
        } else {
            scanner.scan(area.range(), &Filter::OWN_WRITTEN, &mut runs).unwrap();
        }
        area.pages_of(&runs)
    };
    assert_eq!(written(true), [(0, 8)]);
    assert_eq!(written(true), []);
    area.write(3);
    area.write(12);
    assert_eq!(written(false), [(3, 4), (12, 13)]);
    assert_eq!(written(true), [(3, 4), (12, 13)]);
    assert_eq!(written(false), []);
    assert_eq!(populated(&area), [(0, 8), (12, 13)], "protected pages are populated still");

    // What the process drops is not among the pages of the last look.
    area.write(1);
    // SAFETY: empties a page of our own that nothing refers to.
    unsafe { libc::madvise(area.start.add(5 * PAGE as usize).cast(), PAGE as usize, libc::MADV_DONTNEED) };
    let mut runs = Vec::new();
    scanner.scan(area.range(), &Filter::OWN_DATA_AND_WRITTEN, &mut runs).unwrap();
    let told: Vec<_> = area
        .pages_of(&runs)
        .into_iter()
        .zip(runs.iter().map(|run| run.categories.contains(Categories::WRITTEN)))
        .collect();
    assert_eq!(told, [((0, 1), false), ((1, 2), true), ((2, 5), false), ((6, 8), false), ((12, 13), false)]);
}

#[test]
fn markers_of_protected_empty_pages_are_not_populated() {
    let area = Area::anonymous(16);
    area.write(2);
    let mut scanner = scanner();
    if !scanner.has_scan() || !sees_frames() {
        return;
    }
    let Some(_uffd) = track_writes(&area) else { return };
    let everything = Filter { any_of: Categories::empty(), ..Filter::OWN_WRITTEN };
    scanner.scan_and_protect(area.range(), &everything, &mut Vec::new()).unwrap();
    let mut runs = Vec::new();
    scanner.scan(area.range(), &Filter::OWN_DATA, &mut runs).unwrap();
    assert!(
        runs.iter().any(|run| run.categories.contains(Categories::SWAPPED)),
        "there are markers: {runs:?}"
    );
    assert_eq!(populated(&area), [(2, 3)]);
}

/// A forked child that writes one page, says so, and waits to be killed.
fn fork_writing(area: &Area, page: u64) -> i32 {
    let (ready, tell) = rustix::pipe::pipe().unwrap();
    // SAFETY: the child only writes memory and makes system calls, all safe after fork.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        area.write(page);
        // SAFETY: system calls on a byte of our own and without arguments.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            libc::write(tell.as_raw_fd(), (&raw const page).cast(), 1);
            loop {
                libc::pause();
            }
        }
    }
    let mut byte = [0; 1];
    assert_eq!(rustix::io::read(&ready, &mut byte).unwrap(), 1);
    child
}

fn end(child: i32) {
    // SAFETY: ends and reaps our own child.
    unsafe {
        libc::kill(child, libc::SIGKILL);
        libc::waitpid(child, std::ptr::null_mut(), 0);
    }
}

#[test]
fn frames_tell_which_pages_a_forked_child_still_shares() {
    let area = Area::anonymous(8);
    for page in 0..6 {
        area.write(page);
    }
    let child = fork_writing(&area, 3);
    let theirs = PagemapScanner::open(&ProcDir::open(child).unwrap()).unwrap();
    let (mine, their_frames) =
        (scanner().physical_frames(area.range()), theirs.physical_frames(area.range()));
    end(child);
    if !sees_frames() {
        assert_eq!(mine.unwrap_err().errno(), Some(libc::EPERM));
        return;
    }
    let (mine, their_frames) = (mine.unwrap(), their_frames.unwrap());
    assert_eq!(mine.len(), 8);
    let shared: Vec<bool> = mine.iter().zip(&their_frames).map(|(mine, theirs)| mine == theirs).collect();
    assert_eq!(shared, [true, true, true, false, true, true, true, true]);
    assert!(mine[..6].iter().all(|frame| matches!(frame, Frame::Present(_))));
    assert_eq!(mine[6..], [Frame::Absent, Frame::Absent]);
}

#[test]
fn an_ended_process_is_gone() {
    let area = Area::anonymous(4);
    area.write(0);
    let child = fork_writing(&area, 1);
    let mut theirs = PagemapScanner::open(&ProcDir::open(child).unwrap()).unwrap();
    assert_eq!(area.pages_of(&theirs.populated(area.range()).unwrap()), [(0, 2)]);
    end(child);
    let scanned = theirs.populated(area.range());
    theirs.use_words();
    let read = theirs.populated(area.range());
    assert!(read.unwrap_err().is_gone());
    assert!(scanned.unwrap_err().is_gone());
}

#[test]
#[ignore = "measures: run it alone, with --nocapture"]
fn figures_for_one_gib() {
    let gib = (1 << 30) / PAGE;
    let touched = Area::anonymous(gib);
    let sparse = Area::anonymous(gib);
    (0..gib).for_each(|page| touched.write(page));
    (0..gib).step_by(1024).for_each(|page| sparse.write(page));
    for scanner in &mut scanners() {
        let how = if scanner.has_scan() { "PAGEMAP_SCAN" } else { "words" };
        for (what, area) in [("touched", &touched), ("1 page in 1024", &sparse)] {
            for _ in 0..3 {
                let started = Instant::now();
                let runs = scanner.populated(area.range()).unwrap().len();
                let any = started.elapsed();
                let started = Instant::now();
                assert_eq!(scanner.populated_anonymous(area.range()).unwrap().len(), runs);
                let anonymous = started.elapsed();
                println!("{how}, 1 GiB, {what}: {runs} runs in {any:?}, known to be anonymous {anonymous:?}");
            }
        }
    }
    let started = Instant::now();
    let frames = scanner().physical_frames(touched.range()).map(|frames| frames.len());
    println!("frames of 1 GiB: {frames:?} in {:?}", started.elapsed());
    let dir = ProcDir::open(std::process::id() as i32).unwrap();
    let started = Instant::now();
    assert!(dir.smaps().unwrap().len() > 2);
    println!("smaps with 1 GiB touched: {:?}", started.elapsed());
}
