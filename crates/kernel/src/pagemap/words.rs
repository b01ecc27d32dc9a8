//! The words of `/proc/PID/pagemap`: one for each page, mapped or not.
//!
//! ```text
//! 63 present  62 swapped  61 file or shared  58 guard (6.15)  57 write-protected by userfaultfd (5.13)
//! 56 mapped by nobody else  55 soft-dirty  54…0 frame (with CAP_SYS_ADMIN), or swap type (4…0) and offset
//! ```

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::OFlags;

use super::{Categories, Filter, PageRun, PagemapScanner, page_size, push_run};
use crate::proc::ProcDir;
use crate::{Error, Result, fault};

const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const FILE: u64 = 1 << 61;
const GUARD: u64 = 1 << 58;
const PROTECTED: u64 = 1 << 57;
const EXCLUSIVE: u64 = 1 << 56;
const SOFT_DIRTY: u64 = 1 << 55;
const FRAME: u64 = (1 << 55) - 1;
/// The last swap type: not a swap device but a marker in an entry without a page (include/linux/swap.h).
const MARKER: u64 = 31;

/// Whether a word stands for a page in swap. Without `CAP_SYS_ADMIN` the type is hidden, and a marker seems
/// to be one.
fn is_swapped(word: u64) -> bool {
    word & (PRESENT | SWAPPED) == SWAPPED && word & GUARD == 0 && word & MARKER != MARKER
}

/// A huge page mapped as a whole, on machines whose pages have 4 KiB.
const HUGE_PAGE: u64 = 2 << 20;

/// How often the kernel has moved pages to other frames, as `/proc/vmstat` counts: by migration (compaction, NUMA
/// balancing) and by making small pages huge. While the number stays the same, frames can be compared.
pub fn pages_moved() -> Result<u64> {
    const COUNTERS: [&str; 2] = ["pgmigrate_success", "thp_collapse_alloc"];
    fault::point();
    let text = std::fs::read_to_string("/proc/vmstat")
        .map_err(|source| Error::new("read", "/proc/vmstat", source))?;
    let counters = text.lines().filter_map(|line| line.split_once(' '));
    let moved = counters.filter(|(name, _)| COUNTERS.contains(name));
    Ok(moved.filter_map(|(_, count)| count.parse::<u64>().ok()).fold(0, u64::wrapping_add))
}

/// How many words are read at once: 64 KiB, those of 32 MiB of memory.
const WORDS: usize = 8192;

/// Where a page's content is. Two processes share a page when they have the same frame or swap slot for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Frame {
    /// Nowhere: never touched, or a guard page.
    Absent,
    /// In memory: the number of the page frame. The zero page has one as well, common to all.
    Present(u64),
    /// In swap: type and offset in one number, opaque.
    Swapped(u64),
}

impl Frame {
    /// What a word says.
    pub fn of(word: u64) -> Self {
        match word & PRESENT {
            0 if is_swapped(word) => Self::Swapped(word & FRAME),
            0 => Self::Absent,
            _ => Self::Present(word & FRAME),
        }
    }
}

impl PagemapScanner {
    /// Where each page of `range` is, in order. The range must be aligned to pages.
    ///
    /// Needs `CAP_SYS_ADMIN` in the initial user namespace when it is read, else `EPERM`; compare frames only
    /// while both processes are stopped, since the kernel may migrate pages at any time (compaction), even
    /// then: equal frames prove sharing, different ones only suggest that there is none.
    pub fn physical_frames(&self, range: Range<u64>) -> Result<Vec<Frame>> {
        let mut frames = Vec::with_capacity(((range.end.saturating_sub(range.start)) / page_size()) as usize);
        let mut hidden = false;
        self.each_word(range, |_, word| {
            let frame = Frame::of(word);
            hidden |= frame == Frame::Present(0);
            frames.push(frame);
        })?;
        if hidden {
            let why = std::io::Error::from_raw_os_error(libc::EPERM);
            return Err(Error::new("reading page frames", &self.object, why));
        }
        Ok(frames)
    }

    /// Calls `visit` with the address and the place of each page of `run` that another process may have, too: of all that
    /// are not known to be mapped here alone. Equal places of two processes mean one page, as long as no page is moved
    /// ([`pages_moved`]). The place is none if page frames are hidden from us (that takes `CAP_SYS_ADMIN` in the initial
    /// user namespace).
    pub fn maybe_shared(&self, run: &PageRun, mut visit: impl FnMut(u64, Option<u64>)) -> Result<()> {
        let visit_word = |address: u64, word: u64| {
            let place = word & FRAME;
            if word & PRESENT == 0 {
                if is_swapped(word) {
                    visit(address, (place != 0).then_some(place | SWAPPED));
                }
            } else if word & EXCLUSIVE == 0 {
                visit(address, (place != 0).then_some(place));
            }
        };
        if run.categories.contains(Categories::HUGE) {
            self.each_huge_page(run, visit_word)
        } else {
            self.each_word(run.start..run.end, visit_word)
        }
    }

    /// [`Self::each_word`] of a run of huge pages, whose frames follow each other: one word is read of each.
    fn each_huge_page(&self, run: &PageRun, mut visit: impl FnMut(u64, u64)) -> Result<()> {
        let page = page_size();
        let mut start = run.start;
        while start < run.end {
            let end = (start / HUGE_PAGE + 1).saturating_mul(HUGE_PAGE).min(run.end);
            let mut first = None;
            self.each_word(start..start.saturating_add(page), |_, word| first = Some(word))?;
            for (at, address) in (start..end).step_by(page as usize).enumerate() {
                let word = first.unwrap_or_default();
                let hidden = word & FRAME == 0 || word & PRESENT == 0;
                visit(address, if hidden { word } else { word.saturating_add(at as u64) });
            }
            start = end;
        }
        Ok(())
    }

    /// [`PagemapScanner::scan`] on a kernel without `PAGEMAP_SCAN`. Huge pages and `WP_ALLOWED` are not told;
    /// the zero page only to those who may see frames.
    pub(super) fn scan_words(
        &self,
        range: Range<u64>,
        filter: &Filter,
        zero_frame: Option<u64>,
        runs: &mut Vec<PageRun>,
    ) -> Result<()> {
        let first = runs.len();
        self.each_word(range, |address, word| {
            let page = categories(word, zero_frame);
            if filter.wants(page) {
                let run = PageRun {
                    start: address,
                    end: address.saturating_add(page_size()),
                    categories: page & filter.report,
                };
                push_run(runs, first, run);
            }
        })
    }

    /// Calls `visit` with the address and the word of each page.
    fn each_word(&self, range: Range<u64>, mut visit: impl FnMut(u64, u64)) -> Result<()> {
        let page = page_size();
        let pages = range.end.saturating_sub(range.start).div_ceil(page);
        let mut buffer = vec![0u8; pages.min(WORDS as u64) as usize * 8];
        let mut address = range.start;
        while address < range.end {
            let words = ((range.end - address).div_ceil(page)).min(WORDS as u64) as usize;
            let part = buffer.get_mut(..words * 8).unwrap_or_default();
            fault::point();
            let count = rustix::io::pread(&self.pagemap, &mut *part, address / page * 8)
                .map_err(|errno| Error::new("pread", &self.object, errno))?;
            let (read, _) = part.get(..count).unwrap_or_default().as_chunks::<8>();
            if read.is_empty() {
                // The file ends where the address space does, and is empty once the process has none.
                return Err(Error::new(
                    "pread",
                    format_args!("{} at address {address:#x}", self.object),
                    std::io::Error::from_raw_os_error(libc::ESRCH),
                ));
            }
            for word in read {
                visit(address, u64::from_ne_bytes(*word));
                address = address.saturating_add(page);
            }
        }
        Ok(())
    }
}

/// What a word says of its page, where the zero page has that frame.
pub fn categories(word: u64, zero_frame: Option<u64>) -> Categories {
    let mut page = Categories::empty();
    page.set(Categories::PRESENT, word & PRESENT != 0);
    page.set(Categories::SWAPPED, is_swapped(word));
    page.set(Categories::FILE, word & FILE != 0);
    page.set(Categories::GUARD, word & GUARD != 0);
    page.set(Categories::SOFT_DIRTY, word & SOFT_DIRTY != 0);
    page.set(Categories::WRITTEN, word & (PRESENT | SWAPPED) != 0 && word & PROTECTED == 0);
    page.set(Categories::ZERO, word & PRESENT != 0 && zero_frame == Some(word & FRAME));
    page
}

/// Whether page frames are shown to us. If they are hidden, some pages cannot be told from others: see the module.
pub fn sees_frames() -> bool {
    zero_frame().is_some()
}

/// The frame of the zero page, learnt from a page of our own that is read but never written. None if frames
/// are hidden from us: then zero pages look like any other, and cost only the reading of them.
pub(super) fn zero_frame() -> Option<u64> {
    use rustix::mm::{Advice, MapFlags, ProtFlags};
    let length = rustix::param::page_size();
    // SAFETY: a new mapping of our own, unmapped below; nothing else refers to it.
    unsafe {
        let page =
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), length, ProtFlags::READ, MapFlags::PRIVATE)
                .ok()?;
        let _ = rustix::mm::madvise(page, length, Advice::LinuxNoHugepage);
        page.cast::<u8>().read_volatile();
        let frame = own_frame(page as u64);
        rustix::mm::munmap(page, length).ok()?;
        frame
    }
}

fn own_frame(address: u64) -> Option<u64> {
    let own = ProcDir::open(std::process::id() as i32).ok()?;
    let pagemap = own.open_file("pagemap", OFlags::RDONLY).ok()?;
    let word = word_at(pagemap.as_fd(), address)?;
    (word & PRESENT != 0 && word & FRAME != 0).then_some(word & FRAME)
}

fn word_at(pagemap: BorrowedFd<'_>, address: u64) -> Option<u64> {
    let mut word = [0; 8];
    let count = rustix::io::pread(pagemap, &mut word, address / page_size() * 8).ok()?;
    (count == word.len()).then(|| u64::from_ne_bytes(word))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever bits a word has, both readings of it agree, and nothing is both here and elsewhere.
        #[test]
        fn any_word_is_in_one_place(word: u64, zero: Option<u64>) {
            let (page, frame) = (categories(word, zero), Frame::of(word));
            prop_assert_eq!(page.contains(Categories::PRESENT), matches!(frame, Frame::Present(_)));
            prop_assert_eq!(page.contains(Categories::SWAPPED), matches!(frame, Frame::Swapped(_)));
            prop_assert!(!page.contains(Categories::PRESENT | Categories::SWAPPED));
            prop_assert!(!page.contains(Categories::GUARD | Categories::SWAPPED), "a guard page holds nothing");
            prop_assert!(!page.contains(Categories::ZERO) || page.contains(Categories::PRESENT));
            let (Frame::Present(number) | Frame::Swapped(number)) = frame else { return Ok(()) };
            prop_assert!(number < 1 << 55);
        }

        #[test]
        fn the_frame_of_the_zero_page_is_zero(number in 1_u64..1 << 55, flags in 0_u64..1 << 8) {
            let word = PRESENT | flags << 55 | number;
            prop_assert!(categories(word, Some(number)).contains(Categories::ZERO));
            prop_assert!(!categories(word, Some(number ^ 1)).contains(Categories::ZERO));
            prop_assert!(!categories(word & !PRESENT, Some(number)).contains(Categories::ZERO));
        }
    }
}
