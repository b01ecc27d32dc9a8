//! Which pages of a process hold what: the `PAGEMAP_SCAN` ioctl (Linux 6.7) and, before it, the words of
//! `/proc/PID/pagemap` (Documentation/admin-guide/mm/pagemap.rst).
//!
//! The descriptor stays with the address space it was opened on: after an execve, open a new one.
//!
//! A page can look swapped out and hold nothing: where a userfaultfd write-protects empty pages (`WP_ASYNC`
//! implies `WP_UNPOPULATED`) it leaves markers, guard regions are markers too ([`Categories::GUARD`] since
//! 6.16), and `PAGEMAP_SCAN` counts both as swapped. [`PagemapScanner::populated`] sees through it if page
//! frames are not hidden.

mod words;

#[cfg(test)]
mod scan_tests;

use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};

use linux_raw_sys::general::{PM_SCAN_CHECK_WPASYNC, PM_SCAN_WP_MATCHING, page_region, pm_scan_arg};
use rustix::fs::OFlags;

use crate::proc::ProcDir;
use crate::{Error, Result, fault};
pub use words::{Frame, categories, pages_moved, sees_frames};

bitflags::bitflags! {
    /// What a page is; the bits are those of `PAGE_IS_*`.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub struct Categories: u64 {
        /// Its mapping is registered with a userfaultfd in `WP_ASYNC` mode.
        const WP_ALLOWED = 1;
        /// Written since it was last write-protected.
        const WRITTEN = 2;
        /// Belongs to a file or to shared memory, in contrast to the process's own anonymous memory.
        const FILE = 4;
        /// In memory.
        const PRESENT = 8;
        /// In swap (or a marker, see the module).
        const SWAPPED = 16;
        /// The zero page: read, never written. The huge zero page is told only by newer kernels.
        const ZERO = 32;
        /// Part of a huge page mapped as a whole.
        const HUGE = 64;
        /// Written since soft-dirty bits were cleared.
        const SOFT_DIRTY = 128;
        /// In a guard region (6.16).
        const GUARD = 256;
    }
}

/// Adjacent pages of the same categories.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRun {
    /// First address.
    pub start: u64,
    /// First address after it.
    pub end: u64,
    /// What they are, of the categories that were to be reported.
    pub categories: Categories,
}

impl PageRun {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Whether there is no page in it; a scan never gives such a run.
    pub fn is_empty(&self) -> bool {
        self.end <= self.start
    }
}

/// Which pages a scan is after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Filter {
    /// A page must be all of these.
    pub all_of: Categories,
    /// A page must be none of these.
    pub none_of: Categories,
    /// A page must be one of these, unless there are none.
    pub any_of: Categories,
    /// What to tell about the pages found. Every category here splits runs.
    pub report: Categories,
}

impl Filter {
    /// Pages that hold data of a private mapping's own; see [`PagemapScanner::populated`].
    pub const OWN_DATA: Self = Self {
        all_of: Categories::empty(),
        none_of: Categories::ZERO.union(Categories::FILE).union(Categories::GUARD),
        any_of: Categories::PRESENT.union(Categories::SWAPPED),
        report: Categories::PRESENT.union(Categories::SWAPPED).union(Categories::HUGE),
    };

    /// The same pages, each run told apart by whether it was written since it was write-protected, for the
    /// last look of a pre-copy: pages without [`Categories::WRITTEN`] are as they were, and pages copied
    /// before that no run contains have been dropped by the process and read as zeros now (or as the file's).
    pub const OWN_DATA_AND_WRITTEN: Self =
        Self { report: Self::OWN_DATA.report.union(Categories::WRITTEN), ..Self::OWN_DATA };

    /// Pages of a private mapping's own that were written since they were write-protected under `WP_ASYNC`.
    ///
    /// Never arm tracking with `WRITTEN` alone: empty pages count as written, and the kernel would fill
    /// the page tables of everything reserved with markers, that look like swapped pages.
    pub const OWN_WRITTEN: Self = Self {
        all_of: Categories::WRITTEN,
        report: Self::OWN_DATA.report.union(Categories::WRITTEN),
        ..Self::OWN_DATA
    };

    /// Pages of a private mapping's own that were not written since they were write-protected under `WP_ASYNC`. Of a
    /// mapping that is not watched there are none.
    pub const OWN_CLEAN: Self = Self {
        all_of: Categories::WP_ALLOWED,
        none_of: Self::OWN_DATA.none_of.union(Categories::WRITTEN),
        report: Categories::empty(),
        ..Self::OWN_DATA
    };

    /// Pages of a shared mapping, written through this mapping since they were write-protected under
    /// `WP_ASYNC`.
    pub const SHARED_WRITTEN: Self =
        Self { none_of: Categories::ZERO.union(Categories::GUARD), ..Self::OWN_WRITTEN };

    /// The same filter for anonymous mappings, where no page is a file's. To find out costs the kernel a look
    /// at the page itself, and makes a scan of much memory four times slower.
    #[must_use]
    pub const fn for_anonymous(self) -> Self {
        Self { none_of: self.none_of.difference(Categories::FILE), ..self }
    }

    /// Whether a page of these categories is wanted.
    fn wants(&self, page: Categories) -> bool {
        page.contains(self.all_of)
            && !page.intersects(self.none_of)
            && (self.any_of.is_empty() || page.intersects(self.any_of))
    }
}

/// How many runs the kernel gives at once.
const REGIONS: usize = 4096;

/// The size of a page in bytes.
fn page_size() -> u64 {
    rustix::param::page_size() as u64
}

/// Scans the pages of one address space.
#[derive(Debug)]
pub struct PagemapScanner {
    pagemap: OwnedFd,
    object: String,
    how: How,
    /// Categories this kernel knows.
    known: Categories,
}

/// What the kernel offers.
#[derive(Debug)]
enum How {
    /// `PAGEMAP_SCAN`, with the buffer it fills.
    Scan(Vec<page_region>),
    /// The words of the file, with the frame of the zero page if we may see frames.
    Words { zero_frame: Option<u64> },
}

impl PagemapScanner {
    /// Opens the pagemap of a process and finds out what the kernel offers.
    pub fn open(process: &ProcDir) -> Result<Self> {
        let pagemap = process.open_file("pagemap", OFlags::RDONLY)?;
        let object = format!("{}/pagemap", process.path());
        let how = How::Scan(Vec::with_capacity(REGIONS));
        let mut scanner = Self { pagemap, object, how, known: Categories::all() };
        match scanner.probe() {
            Ok(()) => {}
            // This kernel does not know PAGE_IS_GUARD.
            Err(error) if error.errno() == Some(libc::EINVAL) => {
                scanner.known.remove(Categories::GUARD);
                scanner.probe()?;
            }
            Err(error) if error.errno() == Some(libc::ENOTTY) => scanner.use_words(),
            Err(error) => return Err(error),
        }
        Ok(scanner)
    }

    /// Whether the kernel has `PAGEMAP_SCAN`: then a scan may span any range, up to the whole address
    /// space, at little cost; without it each page of the range costs a word, mapped or not.
    pub fn has_scan(&self) -> bool {
        matches!(self.how, How::Scan(_))
    }

    fn use_words(&mut self) {
        self.known = Categories::all();
        self.how = How::Words { zero_frame: words::zero_frame() };
    }

    /// An empty scan, to see whether the kernel takes the known categories.
    fn probe(&mut self) -> Result<()> {
        let mut argument = empty_argument();
        argument.return_mask = self.known.bits();
        self.ioctl(&mut argument).map(|_| ())
    }

    /// Finds the pages of `range` that `filter` wants, and appends them to `runs` in ascending order.
    ///
    /// The range must be aligned to pages.
    pub fn scan(&mut self, range: Range<u64>, filter: &Filter, runs: &mut Vec<PageRun>) -> Result<()> {
        match self.how {
            How::Scan(_) => self.scan_with(0, range, filter, runs),
            How::Words { zero_frame } => self.scan_words(range, filter, zero_frame, runs),
        }
    }

    /// The same, and write-protects the pages found in the same step, so that no write is lost in between.
    ///
    /// All of the range must be registered with a userfaultfd in `WP_ASYNC` mode (else `EPERM`), and the
    /// kernel must have `PAGEMAP_SCAN` (else `ENOTTY`).
    pub fn scan_and_protect(
        &mut self,
        range: Range<u64>,
        filter: &Filter,
        runs: &mut Vec<PageRun>,
    ) -> Result<()> {
        self.scan_with(u64::from(PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC), range, filter, runs)
    }

    /// The same for a range of any mappings: those that no userfaultfd watches are passed over, and not reported.
    pub fn take_written(
        &mut self,
        range: Range<u64>,
        filter: &Filter,
        runs: &mut Vec<PageRun>,
    ) -> Result<()> {
        self.scan_with(u64::from(PM_SCAN_WP_MATCHING), range, filter, runs)
    }

    /// The pages of `range` that hold data of the process's own, for a range of private mappings: present or
    /// swapped, not the zero page, and of a file's mapping only what was modified. Reported as present,
    /// swapped, huge.
    ///
    /// Pages of shared mappings are not found: their content belongs to the file or memory object.
    pub fn populated(&mut self, range: Range<u64>) -> Result<Vec<PageRun>> {
        self.populated_by(range, &Filter::OWN_DATA)
    }

    /// The same, faster, for a range of private anonymous mappings.
    pub fn populated_anonymous(&mut self, range: Range<u64>) -> Result<Vec<PageRun>> {
        self.populated_by(range, &Filter::OWN_DATA.for_anonymous())
    }

    /// The same as [`Self::populated`], or as [`Self::populated_anonymous`], and the guard regions (`MADV_GUARD_INSTALL`,
    /// Linux 6.13) in the range.
    pub fn populated_and_guards(
        &mut self,
        range: Range<u64>,
        anonymous: bool,
    ) -> Result<(Vec<PageRun>, Vec<PageRun>)> {
        let own = if anonymous { Filter::OWN_DATA.for_anonymous() } else { Filter::OWN_DATA };
        let filter = Filter {
            none_of: own.none_of.difference(Categories::GUARD),
            report: own.report.union(Categories::GUARD),
            ..own
        };
        let only_guards = Filter {
            all_of: Categories::GUARD,
            none_of: Categories::empty(),
            any_of: Categories::empty(),
            ..filter
        };
        let (mut found, mut guards) = (Vec::new(), Vec::new());
        if !self.has_scan() {
            self.scan(range.clone(), &only_guards, &mut guards)?;
            return Ok((self.populated_by(range, &own)?, guards));
        }
        self.scan(range, &filter, &mut found)?;
        if !self.known.contains(Categories::GUARD) {
            // This kernel's scan counts them as swapped; the words of the file tell them apart since 6.15.
            for run in found.iter().filter(|run| run.categories.contains(Categories::SWAPPED)) {
                self.scan_words(run.start..run.end, &only_guards, None, &mut guards)?;
            }
        }
        found.retain(|run| {
            let guard = run.categories.contains(Categories::GUARD);
            if guard {
                guards.push(*run);
            }
            !guard
        });
        Ok((self.see_through(found, &own)?, guards))
    }

    fn populated_by(&mut self, range: Range<u64>, filter: &Filter) -> Result<Vec<PageRun>> {
        let mut found = Vec::new();
        self.scan(range, filter, &mut found)?;
        self.see_through(found, filter)
    }

    /// Leaves out of what a scan found what only looks swapped.
    fn see_through(&self, found: Vec<PageRun>, filter: &Filter) -> Result<Vec<PageRun>> {
        if !self.has_scan() || found.iter().all(|run| !run.categories.contains(Categories::SWAPPED)) {
            return Ok(found);
        }
        let mut runs = Vec::with_capacity(found.len());
        for run in found {
            if run.categories.contains(Categories::SWAPPED) {
                self.scan_words(run.start..run.end, filter, None, &mut runs)?;
            } else {
                runs.push(run);
            }
        }
        Ok(runs)
    }

    /// Calls the kernel until the end of the range, merging runs across calls.
    fn scan_with(
        &mut self,
        flags: u64,
        range: Range<u64>,
        filter: &Filter,
        runs: &mut Vec<PageRun>,
    ) -> Result<()> {
        let known = self.known;
        let mut argument = empty_argument();
        argument.flags = flags;
        argument.end = range.end;
        argument.category_mask = (filter.all_of | (filter.none_of & known)).bits();
        argument.category_inverted = (filter.none_of & known).bits();
        argument.category_anyof_mask = filter.any_of.bits();
        argument.return_mask = (filter.report & known).bits();
        let first = runs.len();
        let mut start = range.start;
        while start < range.end {
            argument.start = start;
            argument.walk_end = 0;
            let regions = self.ioctl(&mut argument)?;
            // The kernel fills its own buffer of 512 regions several times over. When the walk reaches the
            // end of the range, `walk_end` can be left where the last buffer but one was full (seen in 6.18):
            // the regions themselves tell how far it came.
            let mut next = regions.last().map_or(start, |region| region.end);
            for region in regions {
                let categories = Categories::from_bits_retain(region.categories);
                push_run(runs, first, PageRun { start: region.start, end: region.end, categories });
            }
            next = next.max(argument.walk_end);
            if next <= start {
                let why = format!("the walk stands still at {start:#x}");
                return Err(Error::malformed("ioctl(PAGEMAP_SCAN)", &self.object, why));
            }
            start = next;
        }
        Ok(())
    }

    /// One call; gives the regions that the kernel wrote.
    fn ioctl(&mut self, argument: &mut pm_scan_arg) -> Result<&[page_region]> {
        let failed = |source| Error::new("ioctl(PAGEMAP_SCAN)", &self.object, source);
        let How::Scan(buffer) = &mut self.how else {
            return Err(failed(std::io::Error::from_raw_os_error(libc::ENOTTY)));
        };
        buffer.clear();
        argument.vec = buffer.as_mut_ptr() as u64;
        argument.vec_len = buffer.capacity() as u64;
        loop {
            fault::point();
            // SAFETY: the kernel reads and writes the argument, and writes at most `vec_len` regions to
            // `vec`, the spare capacity of the buffer.
            let count =
                unsafe { libc::ioctl(self.pagemap.as_raw_fd(), PAGEMAP_SCAN, std::ptr::from_mut(argument)) };
            if let Ok(count) = usize::try_from(count) {
                // SAFETY: the kernel filled that many regions; bounded by the capacity all the same.
                unsafe { buffer.set_len(count.min(buffer.capacity())) };
                return Ok(buffer);
            }
            let error = std::io::Error::last_os_error();
            if error.kind() != std::io::ErrorKind::Interrupted {
                return Err(failed(error));
            }
        }
    }
}

/// `_IOWR('f', 16, struct pm_scan_arg)`
const PAGEMAP_SCAN: libc::Ioctl =
    (3 << 30 | size_of::<pm_scan_arg>() << 16 | (b'f' as usize) << 8 | 16) as libc::Ioctl;

fn empty_argument() -> pm_scan_arg {
    pm_scan_arg {
        size: size_of::<pm_scan_arg>() as u64,
        flags: 0,
        start: 0,
        end: 0,
        walk_end: 0,
        vec: 0,
        vec_len: 0,
        max_pages: 0,
        category_inverted: 0,
        category_mask: 0,
        category_anyof_mask: 0,
        return_mask: 0,
    }
}

/// Appends a run, or lengthens the last one; runs before `first` are another scan's.
fn push_run(runs: &mut Vec<PageRun>, first: usize, run: PageRun) {
    if runs.len() > first
        && let Some(last) = runs.last_mut()
        && last.end == run.start
        && last.categories == run.categories
    {
        last.end = run.end;
    } else {
        runs.push(run);
    }
}
