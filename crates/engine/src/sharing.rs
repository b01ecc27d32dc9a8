//! Which private pages of a frozen tree are whose: each process's own, or shared copy-on-write with one that was forked
//! from it, or from which it was, or from the same.
//!
//! A page that several processes share lies at the same address in all of them and is one page frame. It is stored
//! once, with the first process of the tree that has it; the others *inherit* it. Most pages of most processes are
//! mapped nowhere else, which the kernel tells cheaply; of the others the frames are compared. Where frames are hidden
//! (they take `CAP_SYS_ADMIN` in the initial user namespace), or do not keep still, contents are compared instead: pages
//! that are equal may be shared without anybody noticing.

use std::collections::{HashMap, HashSet};

use limosa_image::SpaceId;
use limosa_kernel::memory::ForeignMemory;
use limosa_kernel::pagemap::{self, Categories, PageRun, PagemapScanner};

use crate::error::CaptureError;
use crate::pieces::Piece;
use crate::resources::mapping::MappingState;
use crate::state::{Body, Life, Pages, Process};
use crate::view::ProcessView;

const PAGE: u64 = 4096;
const REGION: u64 = 2 << 20;
const REGION_PAGES: usize = (REGION / PAGE) as usize;
/// How often frames are looked at again that were moved meanwhile.
const TRIES: usize = 3;

/// Pages of a mapping that are to be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First address.
    pub start: u64,
    /// First address behind them.
    pub end: u64,
    /// Whether another process may have them as well. process_vm_readv(2) would make a copy of each for the process that
    /// it reads (it pins pages, and a pinned page must be the process's alone): they are read otherwise.
    pub shared: bool,
    /// Whether pages of it were stored before, so that zeros are to be stored in their place, too.
    pub again: bool,
}

impl Run {
    /// Bytes.
    pub fn length(&self) -> u64 {
        self.end - self.start
    }
}

/// The pages of a process that its own space is to hold, by mapping.
pub type OwnRuns = Vec<Vec<Run>>;

/// Finds all private pages of all processes: writes what each inherits, which are huge and which are guards into its state,
/// and gives what is to be stored of each (nothing of one that has ended).
pub fn survey(views: &[ProcessView], processes: &mut [Process]) -> Result<Vec<OwnRuns>, CaptureError> {
    let mut found = Vec::with_capacity(processes.len());
    for (view, process) in views.iter().zip(&mut *processes) {
        found.push(match &mut process.life {
            Life::Alive(body) => populated(view, body)?,
            Life::Zombie { .. } => Vec::new(),
        });
    }
    let shared = find_shared(views, processes, &found)?;
    let mut stored = Vec::with_capacity(processes.len());
    for ((process, shared), runs) in processes.iter_mut().zip(shared).zip(found) {
        let Life::Alive(body) = &mut process.life else {
            stored.push(Vec::new());
            continue;
        };
        body.huge_pages = huge_pages(&body.mappings, &runs);
        stored.push(runs.iter().map(|runs| own_runs(runs, &shared)).collect());
        if !shared.inherited.is_empty() {
            body.pages = Pages::Partly { own: body.pages.own(), inherited: shared.inherited };
        }
    }
    Ok(stored)
}

/// The pages of each mapping; the guard regions in it are written into its state.
fn populated(view: &ProcessView, body: &mut Body) -> Result<Vec<Vec<PageRun>>, CaptureError> {
    let mut scanner = PagemapScanner::open(view.proc)?;
    let scan = |mapping: &mut MappingState| -> Result<Vec<PageRun>, CaptureError> {
        if !mapping.is_private() || mapping.is_droppable() {
            return Ok(Vec::new());
        }
        let range = mapping.start..mapping.end();
        let (runs, guards) = scanner.populated_and_guards(range, mapping.starts_as_zeros())?;
        mapping.guards = guards.into_iter().map(|run| (run.start, run.end)).collect();
        Ok(runs)
    };
    body.mappings.iter_mut().map(scan).collect()
}

/// The huge pages of private anonymous memory.
fn huge_pages(mappings: &[MappingState], runs: &[Vec<PageRun>]) -> Vec<(u64, u64)> {
    let anonymous = mappings.iter().zip(runs).filter(|(mapping, _)| mapping.starts_as_zeros());
    let huge = anonymous.flat_map(|(_, runs)| runs).filter(|run| run.categories.contains(Categories::HUGE));
    huge.map(|run| (run.start, run.end)).collect()
}

/// The pages of a process that are not its alone; sorted.
#[derive(Debug, Default)]
struct Shared {
    /// Those that are stored with another one.
    inherited: Vec<Piece>,
    /// Those that are stored with it.
    lent: Vec<(u64, u64)>,
}

/// What the processes share; of each page the first process in the tree's order is the one that it is stored with.
fn find_shared(
    views: &[ProcessView],
    processes: &[Process],
    runs: &[Vec<Vec<PageRun>>],
) -> Result<Vec<Shared>, CaptureError> {
    for attempt in 0..=TRIES {
        let identity = if attempt < TRIES { Identity::Frame } else { Identity::Content };
        let (mut atlas, mut moved) = (Atlas::default(), None);
        let mut all = Vec::with_capacity(processes.len());
        let mut hidden = false;
        for ((view, process), runs) in views.iter().zip(processes).zip(runs) {
            let mut shared = Shared::default();
            if let Life::Alive(body) = &process.life {
                let candidates = candidates(view, &body.mappings, runs);
                if !candidates.is_empty() && moved.is_none() {
                    moved = Some(pagemap::pages_moved()?);
                }
                let mut visitor = Visitor::new(view, body.pages.own(), identity, &mut atlas);
                hidden |= visitor.visit(&candidates)?;
                shared = visitor.shared;
            }
            all.push(shared);
        }
        // A page that moves may take the frame of another one that moved: then equal frames mean nothing.
        let still = || Ok::<_, CaptureError>(moved.is_none() || moved == Some(pagemap::pages_moved()?));
        if identity == Identity::Content || !hidden && still()? {
            return Ok(all);
        }
    }
    unreachable!("the last attempt compares contents")
}

/// The mappings of a process that have pages that others may have, and their pages.
fn candidates<'a>(
    view: &ProcessView,
    mappings: &'a [MappingState],
    runs: &'a [Vec<PageRun>],
) -> Vec<(&'a MappingState, &'a [PageRun])> {
    let starts: HashSet<u64> = view
        .mappings
        .iter()
        .filter(|mapping| mapping.maybe_shared.is_none_or(|bytes| bytes > 0))
        .map(|mapping| mapping.start)
        .collect();
    let pairs = mappings.iter().zip(runs.iter().map(Vec::as_slice));
    pairs.filter(|(mapping, runs)| !runs.is_empty() && starts.contains(&mapping.start)).collect()
}

/// What two pages at one address have in common if they are one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Identity {
    /// Their frame.
    Frame,
    /// A digest of their content.
    Content,
}

/// The pages that other processes may have too, found so far: by region of 2 MiB, and by whether an absent page there
/// is one of zeros.
#[derive(Debug, Default)]
struct Atlas {
    sheets: HashMap<(u64, bool), Vec<Sheet>>,
    /// Contents that have been seen, by digest, and their numbers.
    contents: HashMap<[u8; 32], u64>,
}

/// The pages of one process in a region, by a number that identifies them; 0 for none.
#[derive(Debug)]
struct Sheet {
    owner: SpaceId,
    pages: Box<[u64; REGION_PAGES]>,
}

/// Goes through the pages of a process.
struct Visitor<'a> {
    view: &'a ProcessView<'a>,
    space: SpaceId,
    identity: Identity,
    atlas: &'a mut Atlas,
    shared: Shared,
    /// The region that is being looked at, and its pages.
    region: (u64, bool),
    pages: Box<[u64; REGION_PAGES]>,
}

impl<'a> Visitor<'a> {
    fn new(view: &'a ProcessView, space: SpaceId, identity: Identity, atlas: &'a mut Atlas) -> Self {
        let pages = Box::new([0; REGION_PAGES]);
        Self { view, space, identity, atlas, shared: Shared::default(), region: (0, false), pages }
    }

    /// Looks at all pages that may be shared; tells whether frames are hidden.
    fn visit(&mut self, candidates: &[(&MappingState, &[PageRun])]) -> Result<bool, CaptureError> {
        if candidates.is_empty() {
            return Ok(false);
        }
        let mut hidden = false;
        let scanner = PagemapScanner::open(self.view.proc)?;
        for (mapping, runs) in candidates {
            let zeros = mapping.starts_as_zeros();
            for run in *runs {
                let mut addresses = Vec::new();
                scanner.maybe_shared(run, |address, place| match (self.identity, place) {
                    (Identity::Frame, Some(place)) => self.add(address, zeros, place),
                    (Identity::Frame, None) => hidden = true,
                    (Identity::Content, _) => addresses.push(address),
                })?;
                self.add_contents(&addresses, zeros)?;
            }
        }
        self.settle();
        Ok(hidden)
    }

    fn add_contents(&mut self, addresses: &[u64], zeros: bool) -> Result<(), CaptureError> {
        if addresses.is_empty() {
            return Ok(());
        }
        let memory = ForeignMemory::open(self.view.pid)?;
        let mut page = vec![0; PAGE as usize];
        for address in addresses {
            memory.read(*address, &mut page)?;
            let next = self.atlas.contents.len() as u64 + 1;
            let number = *self.atlas.contents.entry(*blake3::hash(&page).as_bytes()).or_insert(next);
            self.add(*address, zeros, number);
        }
        Ok(())
    }

    fn add(&mut self, address: u64, zeros: bool, page: u64) {
        let region = (address / REGION, zeros);
        if region != self.region {
            self.settle();
            self.region = region;
        }
        self.pages[(address % REGION / PAGE) as usize] = page;
    }

    /// Compares the pages of the region with those known, and adds the rest to the atlas.
    fn settle(&mut self) {
        if self.pages.iter().all(|page| *page == 0) {
            return;
        }
        let known = self.atlas.sheets.entry(self.region).or_default();
        let start = self.region.0 * REGION;
        let mut inherited = Vec::new();
        for sheet in &*known {
            let same: [bool; REGION_PAGES] =
                std::array::from_fn(|at| self.pages[at] == sheet.pages[at] && self.pages[at] != 0);
            for (from, to) in stretches(&same, start) {
                inherited.push(Piece { space: sheet.owner, start: from, end: to });
            }
            for (page, same) in self.pages.iter_mut().zip(same) {
                *page = if same { 0 } else { *page };
            }
        }
        inherited.sort_unstable_by_key(|piece| piece.start);
        for piece in inherited {
            match self.shared.inherited.last_mut() {
                Some(last) if last.space == piece.space && last.end == piece.start => last.end = piece.end,
                _ => self.shared.inherited.push(piece),
            }
        }
        let rest: [bool; REGION_PAGES] = std::array::from_fn(|at| self.pages[at] != 0);
        self.shared.lent.extend(stretches(&rest, start));
        if rest.contains(&true) {
            let pages = std::mem::replace(&mut self.pages, Box::new([0; REGION_PAGES]));
            known.push(Sheet { owner: self.space, pages });
        }
    }
}

/// The stretches of pages that are marked, in a region that begins at `start`.
fn stretches(marked: &[bool; REGION_PAGES], start: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
    let mut at = start;
    marked.chunk_by(|a, b| a == b).filter_map(move |same| {
        let from = at;
        at += same.len() as u64 * PAGE;
        same.first().is_some_and(|marked| *marked).then_some((from, at))
    })
}

/// The parts of `runs` that are stored with the process; all are sorted.
fn own_runs(runs: &[PageRun], shared: &Shared) -> Vec<Run> {
    let mut own = Vec::with_capacity(runs.len());
    for run in runs {
        let heirs = &shared.inherited[shared.inherited.partition_point(|piece| piece.end <= run.start)..];
        let lent = &shared.lent[shared.lent.partition_point(|(_, end)| *end <= run.start)..];
        let inherited = heirs.iter().map(|piece| (piece.start, piece.end, false));
        let lent = lent.iter().map(|(start, end)| (*start, *end, true));
        let mut special: Vec<_> = inherited.take_while(|(start, ..)| *start < run.end).collect();
        special.extend(lent.take_while(|(start, ..)| *start < run.end));
        special.sort_unstable();
        let mut start = run.start;
        let mut add = |start, end, shared| {
            if start < end {
                own.push(Run { start, end, shared, again: false });
            }
        };
        for (from, to, stored) in special {
            let (from, to) = (from.max(run.start), to.min(run.end));
            add(start, from, false);
            if stored {
                add(from, to, true);
            }
            start = to;
        }
        add(start, run.end, false);
    }
    own
}
