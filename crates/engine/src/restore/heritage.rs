//! Heritage: which pages processes of a tree are born with, because they share them copy-on-write.
//!
//! Pages that several processes share come back shared by the way they came to be: one process has them, and the
//! others are forked from it. So a process that makes others may have to hold pages *in trust* before it does: those
//! that two of its children share, or one of them and itself, or one of them and somebody beyond itself from whom it
//! has them. They are loaded into the first that holds them. After the births each drops what is not its own.
//!
//! Pages lie in mappings, and a mapping that is put together of an inherited piece and a new one is two mappings for
//! ever (the kernel does not join them). So what is inherited are *estates*: ranges that contain the whole mapping of every
//! heir. An heir cuts its mappings out of them.
//!
//! All of it is decided beforehand, by functions without effects. What cannot be inherited is loaded into each process by
//! itself: pages of private file mappings (nothing is open yet when processes are born), of stacks that grow, of which
//! one process would have to hold two versions at one address, or whose mappings do not fit together.

use std::collections::HashMap;

use limosa_image::{Checkpoint, SpaceId};
use limosa_puppet::Program;

use super::huge_pages;
use crate::memory;
use crate::pieces::{Piece, Pieces};
use crate::plan::{NodeId, Plan, Role, Step};
use crate::resources::mapping::{Backing, MappingState};
use crate::state::{Body, Life, Tree};

/// A range of private anonymous memory that is mapped before children are born.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Estate {
    start: u64,
    end: u64,
    /// `MAP_NORESERVE`, where the mappings have it.
    flags: i32,
}

impl Estate {
    fn of(mapping: &MappingState) -> Self {
        Self { start: mapping.start, end: mapping.end(), flags: mapping.flags }
    }

    fn contains(&self, other: &Self) -> bool {
        self.flags == other.flags && self.start <= other.start && other.end <= self.end
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.start < other.end && other.start < self.end
    }

    fn advise(&self, purpose: &'static str, advice: i32, program: &mut Program) {
        let arguments = [self.start.into(), (self.end - self.start).into(), advice.into()];
        program.call(purpose, libc::SYS_madvise, arguments);
    }
}

/// What a node of the plan is born with, and holds for those that it makes.
#[derive(Debug, Default)]
pub(crate) struct Trust {
    /// Everything that is mapped when it makes others. The first are those it is born with.
    estates: Vec<Estate>,
    /// How many of the estates it is born with.
    born_with: usize,
    /// What must be loaded into it before it makes others.
    pub(crate) loads: Pieces,
    /// All pages it has when it makes others.
    held: Pieces,
    /// Where those that it loads were huge pages.
    huge_pages: Vec<(u64, u64)>,
}

/// What each node of a plan is born with and holds; empty for a tree that shares no pages.
#[derive(Debug, Default)]
pub(crate) struct Heritage(Vec<Trust>);

/// What the heritage of one node does not tell.
static NOTHING: Trust = Trust {
    estates: Vec::new(),
    born_with: 0,
    loads: Pieces::EMPTY,
    held: Pieces::EMPTY,
    huge_pages: Vec::new(),
};

/// What the heritage depends on of a living process.
#[derive(Debug, Default)]
struct Share {
    /// The space of its own pages.
    own: Option<SpaceId>,
    /// What it has of other spaces, in mappings that can be inherited.
    inherited: Pieces,
    /// The mappings that can be inherited, by address.
    mappings: Vec<Estate>,
    /// Its huge pages: start and end, by address.
    huge_pages: Vec<(u64, u64)>,
}

impl Share {
    fn of(tree: &Tree, role: Role) -> Self {
        let Role::Process(index) = role else { return Self::default() };
        let Some(Life::Alive(body)) = tree.processes.get(index).map(|process| &process.life) else {
            return Self::default();
        };
        let mut share = Self { own: Some(body.pages.own()), ..Self::default() };
        share.huge_pages.clone_from(&body.huge_pages);
        share.mappings.extend(body.mappings.iter().filter(|one| is_inheritable(one)).map(Estate::of));
        if !body.pages.inherited().is_empty() {
            let all: Pieces = body.pages.inherited().iter().copied().collect();
            share.inherited = all.inside_of(&ranges(&share.mappings));
        }
        share
    }
}

impl Heritage {
    /// Who holds what, for a tree that is born by `plan`.
    pub(crate) fn new(tree: &Tree, plan: &Plan) -> Self {
        let shares: Vec<_> = plan.nodes.iter().map(|node| Share::of(tree, node.role)).collect();
        Self::among(&shares, plan)
    }

    fn among(shares: &[Share], plan: &Plan) -> Self {
        if shares.iter().all(|share| share.inherited.is_empty()) {
            return Self::default();
        }
        let needs = needs(shares);
        let made: Vec<Vec<NodeId>> = plan.nodes.iter().map(|node| made_by(&node.steps).collect()).collect();
        let order = plan.makers_last();
        let mut below = needs.clone();
        for node in &order {
            let all = made[*node].iter().flat_map(|child| below[*child].iter()).chain(needs[*node].iter());
            below[*node] = all.collect();
        }
        let mut heritage = Self((0..plan.nodes.len()).map(|_| Trust::default()).collect());
        let families = Families { shares, made: &made, needs: &needs, below: &below };
        for node in order.iter().rev() {
            families.entrust(*node, &mut heritage.0);
        }
        heritage
    }

    /// What `node` holds.
    pub(crate) fn of(&self, node: NodeId) -> &Trust {
        self.0.get(node).unwrap_or(&NOTHING)
    }
}

/// The nodes that `steps` make.
fn made_by(steps: &[Step]) -> impl Iterator<Item = NodeId> + '_ {
    steps.iter().filter_map(|step| match step {
        Step::Child(made) | Step::Sibling(made) => Some(*made),
        Step::OwnSession | Step::OwnGroup => None,
    })
}

/// Whether a mapping can be inherited.
fn is_inheritable(mapping: &MappingState) -> bool {
    matches!(mapping.backing, Backing::Anonymous) && mapping.flags & !libc::MAP_NORESERVE == 0
}

/// The addresses of `estates`.
fn ranges(estates: &[Estate]) -> Vec<(u64, u64)> {
    let mut ranges: Vec<_> = estates.iter().map(|estate| (estate.start, estate.end)).collect();
    ranges.sort_unstable();
    ranges
}

/// For each node, the pages that it shares with another process, by where they are stored.
fn needs(shares: &[Share]) -> Vec<Pieces> {
    let mut lent: HashMap<SpaceId, Vec<Piece>> = HashMap::new();
    for piece in shares.iter().flat_map(|share| share.inherited.iter()) {
        lent.entry(piece.space).or_default().push(piece);
    }
    let mut need = |share: &Share| {
        let lent = share.own.and_then(|own| lent.remove(&own)).unwrap_or_default();
        let lent = lent.into_iter().collect::<Pieces>().inside_of(&ranges(&share.mappings));
        share.inherited.iter().chain(lent.iter()).collect()
    };
    shares.iter().map(&mut need).collect()
}

struct Families<'a> {
    shares: &'a [Share],
    made: &'a [Vec<NodeId>],
    /// What each node shares with another.
    needs: &'a [Pieces],
    /// The same of a node and all that are made by it, directly or not.
    below: &'a [Pieces],
}

impl Families<'_> {
    /// Decides what `node` loads for those it makes, and hands on what each of them is born with.
    fn entrust(&self, node: NodeId, trusts: &mut [Trust]) {
        let born_with = std::mem::take(&mut trusts[node]);
        let branches = self.made[node].iter().map(|child| &self.below[*child]);
        let wanted = Pieces::twice(branches.chain([&self.needs[node]]));
        let loads = wanted.outside_of(&born_with.held.addresses()).one_each(self.shares[node].own);
        let mut trust = Trust { born_with: born_with.estates.len(), ..born_with };
        if !loads.is_empty() {
            self.found_estates(node, &loads, &mut trust.estates);
            trust.loads = loads.inside_of(&ranges(&trust.estates));
            trust.held = trust.held.iter().chain(trust.loads.iter()).collect();
            trust.huge_pages = self.huge_pages(&trust.loads);
        }
        for child in &self.made[node] {
            let inherited = trust.held.and(&self.below[*child]);
            let addresses = inherited.addresses();
            let used = |estate: &&Estate| touches(&addresses, estate.start, estate.end);
            let estates: Vec<Estate> = trust.estates.iter().filter(used).copied().collect();
            // Other pages of the estate come with it.
            let held = trust.held.inside_of(&ranges(&estates));
            let born_with = estates.len();
            trusts[*child] = Trust { estates, born_with, held, ..Trust::default() };
        }
        trusts[node] = trust;
    }

    /// Where the processes that have `loads` stored had huge pages.
    fn huge_pages(&self, loads: &Pieces) -> Vec<(u64, u64)> {
        let mut huge = Vec::new();
        for (space, pieces) in loads.by_space() {
            let owner = self.shares.iter().find(|share| share.own == Some(space));
            let addresses: Vec<_> = pieces.iter().map(|piece| (piece.start, piece.end)).collect();
            let all = owner.map(|owner| owner.huge_pages.as_slice()).unwrap_or_default().iter();
            huge.extend(all.filter(|(start, end)| touches(&addresses, *start, *end)));
        }
        huge.sort_unstable();
        huge
    }

    /// Adds the estates for `loads` to those that `node` is born with: whole mappings of all that share them.
    fn found_estates(&self, node: NodeId, loads: &Pieces, estates: &mut Vec<Estate>) {
        let mut wanted = Vec::new();
        let mut unvisited = vec![node];
        while let Some(one) = unvisited.pop() {
            let shared = loads.and(&self.needs[one]);
            if !shared.is_empty() {
                let addresses = shared.addresses();
                let used = |mapping: &&Estate| touches(&addresses, mapping.start, mapping.end);
                wanted.extend(self.shares[one].mappings.iter().filter(used));
            }
            let heirs = self.made[one].iter().filter(|child| !loads.and(&self.below[**child]).is_empty());
            unvisited.extend(heirs);
        }
        wanted.sort_unstable();
        let old = estates.len();
        for one in wanted {
            if estates[..old].iter().any(|estate| estate.overlaps(&one)) {
                continue;
            }
            match estates[old..].last_mut() {
                Some(last) if last.overlaps(&one) && last.flags == one.flags => {
                    last.end = last.end.max(one.end);
                }
                Some(last) if last.overlaps(&one) => {}
                _ => estates.push(one),
            }
        }
    }
}

/// Whether any of `ranges`, sorted and disjoint, has an address in `start..end`.
fn touches(ranges: &[(u64, u64)], start: u64, end: u64) -> bool {
    ranges.get(ranges.partition_point(|(_, behind)| *behind <= start)).is_some_and(|(first, _)| *first < end)
}

impl Trust {
    /// Whether the node holds nothing.
    pub(crate) fn is_empty(&self) -> bool {
        self.estates.is_empty()
    }

    /// Whether the node must wait for its pages before it makes others.
    pub(crate) fn waits(&self) -> bool {
        !self.loads.is_empty()
    }

    /// Adds the calls that map the estates that the node was not born with, for pages from `checkpoint`.
    pub(crate) fn map_new(&self, checkpoint: &Checkpoint, program: &mut Program) {
        for estate in &self.estates[self.born_with..] {
            let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE | estate.flags;
            let arguments = [
                estate.start.into(),
                (estate.end - estate.start).into(),
                (libc::PROT_READ | libc::PROT_WRITE).into(),
                kind.into(),
                (-1).into(),
                0.into(),
            ];
            program.call("map memory for heirs", libc::SYS_mmap, arguments);
        }
        if !self.huge_pages.is_empty() {
            let stored = memory::stored(checkpoint, &self.loads).addresses();
            let mut huge = huge_pages::among(&self.huge_pages, &stored);
            let addresses = self.loads.addresses();
            huge.retain(|start| huge_pages::is_within(&addresses, *start, start + huge_pages::HUGE_PAGE));
            huge_pages::make(&huge, program);
        }
    }

    /// Adds the calls after which a child is born with what `child` is to have and nothing else. `passed_on` says of each
    /// estate whether it would be passed on so far.
    pub(crate) fn pass_on(&self, child: &Self, passed_on: &mut Vec<bool>, program: &mut Program) {
        passed_on.resize(self.estates.len(), true);
        for (estate, passed_on) in self.estates.iter().zip(passed_on) {
            let wanted = child.estates[..child.born_with].contains(estate);
            if wanted != *passed_on {
                let advice = if wanted { libc::MADV_DOFORK } else { libc::MADV_DONTFORK };
                estate.advise("choose what a child inherits", advice, program);
                *passed_on = wanted;
            }
        }
    }

    /// What a process keeps of its estates, and what it is to get in addition.
    pub(crate) fn settle(&self, body: &Body, checkpoint: &Checkpoint) -> Settlement {
        let left_out = body.vdso.left_out.as_slice();
        let own = memory::stored(checkpoint, &whole(body.pages.own())).outside_of(left_out);
        let inherited = body.pages.inherited().iter().copied().collect::<Pieces>();
        let inherited = inherited.outside_of(&own.addresses()).outside_of(left_out);
        let mut kept = vec![false; body.mappings.len()];
        let missing = |kept_pages: &Pieces| {
            let others = memory::stored(checkpoint, &inherited.without(kept_pages));
            own.without(kept_pages).iter().chain(others.iter()).collect::<Pieces>()
        };
        if self.estates.is_empty() {
            return Settlement { kept, missing: missing(&Pieces::EMPTY), dropped: Vec::new() };
        }
        let ours = |piece: &Piece| piece.space == body.pages.own();
        let held = self.held.iter().filter(ours).chain(self.held.and(&inherited).iter()).collect::<Pieces>();
        let addresses = held.addresses();
        let mut ranges = Vec::new();
        for (mapping, kept) in body.mappings.iter().zip(&mut kept) {
            let (start, end) = (mapping.start, mapping.end());
            *kept = touches(&addresses, start, end)
                && matches!(mapping.backing, Backing::Anonymous)
                && self.estates.iter().any(|estate| estate.contains(&Estate::of(mapping)));
            if *kept {
                ranges.push((start, end));
            }
        }
        let kept_pages = held.inside_of(&ranges);
        let missing = missing(&kept_pages);
        // What is loaded later replaces what is there.
        let foreign = self.held.inside_of(&ranges).without(&kept_pages).outside_of(&missing.addresses());
        Settlement { kept, missing, dropped: foreign.addresses() }
    }

    /// Adds the calls that leave of the estates what the process keeps of them, in the form that its pages are loaded in.
    pub(crate) fn apply(&self, settlement: &Settlement, body: &Body, program: &mut Program) {
        let kept =
            || body.mappings.iter().zip(&settlement.kept).filter(|(_, kept)| **kept).map(|(one, _)| one);
        for estate in &self.estates {
            estate.advise("inherit to children again", libc::MADV_DOFORK, program);
            let mut start = estate.start;
            let inside = kept().filter(|mapping| estate.contains(&Estate::of(mapping)));
            let ends = inside.map(|mapping| (mapping.start, mapping.end())).chain([(estate.end, estate.end)]);
            for (keep, end) in ends {
                if start < keep {
                    let arguments = [start.into(), (keep - start).into()];
                    program.call("give up what others inherit", libc::SYS_munmap, arguments);
                }
                start = end;
            }
        }
        for (start, end) in &settlement.dropped {
            let arguments = [(*start).into(), (end - start).into(), libc::MADV_DONTNEED.into()];
            program.call("give up pages that others inherit", libc::SYS_madvise, arguments);
        }
        let born = (libc::PROT_READ | libc::PROT_WRITE) as u32;
        for mapping in kept() {
            let protection = mapping.protection | libc::PROT_WRITE as u32;
            if protection != born {
                let arguments = [mapping.start.into(), mapping.length.into(), protection.into()];
                program.call("set a mapping's protection", libc::SYS_mprotect, arguments);
            }
        }
    }
}

/// All pages that `space` can have.
pub(super) fn whole(space: SpaceId) -> Pieces {
    [Piece { space, start: 0, end: u64::MAX }].into_iter().collect()
}

/// What a process keeps of its estates, and what it is to get in addition.
#[derive(Debug, Default)]
pub(crate) struct Settlement {
    /// For each mapping, whether it is a part of an estate, and needs not be made.
    pub(crate) kept: Vec<bool>,
    /// Stored pages that are to be loaded once all mappings are made.
    pub(crate) missing: Pieces,
    /// Pages in kept mappings that are neither the process's nor replaced by those.
    dropped: Vec<(u64, u64)>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Kin;

    fn estate(start: u64, end: u64) -> Estate {
        Estate { start, end, flags: 0 }
    }

    fn pieces(list: &[(u64, u64, u32)]) -> Pieces {
        list.iter().map(|(start, end, space)| Piece::from((*start, *end, SpaceId(*space)))).collect()
    }

    /// A process with the space `own`, one mapping, and what it inherits.
    fn share(own: u32, mapping: (u64, u64), inherited: &[(u64, u64, u32)]) -> Share {
        let inherited = pieces(inherited);
        let mappings = vec![estate(mapping.0, mapping.1)];
        Share { own: Some(SpaceId(own)), inherited, mappings, ..Share::default() }
    }

    /// A tree of processes 1, 2, … with these parents.
    fn heritage(parents: &[i32], shares: &[Share]) -> Heritage {
        let kin = |(index, parent): (usize, &i32)| Kin {
            pid: index as i32 + 1,
            parent: *parent,
            process_group: 1,
            session: 1,
            alive: true,
        };
        let kin: Vec<Kin> = parents.iter().enumerate().map(kin).collect();
        Heritage::among(shares, &Plan::new(&kin).unwrap())
    }

    #[test]
    fn a_parent_loads_what_its_children_inherit() {
        let shares = [share(1, (0, 100), &[]), share(2, (0, 100), &[(10, 50, 1)]), share(3, (0, 100), &[])];
        let heritage = heritage(&[0, 1, 1], &shares);
        let parent = heritage.of(0);
        assert_eq!(
            (&parent.loads, parent.estates.as_slice()),
            (&pieces(&[(10, 50, 1)]), &[estate(0, 100)][..])
        );
        assert_eq!((heritage.of(1).born_with, &heritage.of(1).held), (1, &pieces(&[(10, 50, 1)])));
        assert!(
            !heritage.of(1).waits() && heritage.of(2).is_empty(),
            "who shares nothing is born with nothing"
        );
    }

    #[test]
    fn a_parent_holds_in_trust_what_only_its_children_share() {
        let shares =
            [share(1, (500, 600), &[]), share(2, (0, 100), &[]), share(3, (20, 100), &[(30, 40, 2)])];
        let heritage = heritage(&[0, 1, 1], &shares);
        assert_eq!(heritage.of(0).loads, pieces(&[(30, 40, 2)]));
        assert_eq!(heritage.of(0).estates, [estate(0, 100)], "it contains the mappings of both");
        assert_eq!((heritage.of(1).born_with, heritage.of(2).born_with), (1, 1));
    }

    #[test]
    fn what_a_grandchild_inherits_passes_through_its_parent() {
        let shares = [share(1, (0, 100), &[]), share(2, (500, 600), &[]), share(3, (0, 100), &[(0, 10, 1)])];
        let heritage = heritage(&[0, 1, 2], &shares);
        assert_eq!(heritage.of(0).loads, pieces(&[(0, 10, 1)]));
        assert_eq!((heritage.of(1).born_with, heritage.of(2).born_with), (1, 1));
        assert!(!heritage.of(1).waits(), "it has it from its own parent");
    }

    #[test]
    fn of_two_versions_at_one_address_the_holders_own_is_held() {
        let (older, newer) = (share(2, (0, 100), &[]), share(3, (0, 100), &[(0, 20, 2)]));
        let shares = [share(1, (0, 100), &[]), older, newer, share(4, (0, 100), &[(10, 20, 1)])];
        let heritage = heritage(&[0, 1, 1, 1], &shares);
        assert_eq!(heritage.of(0).loads, pieces(&[(10, 20, 1), (0, 10, 2)]));
    }

    #[test]
    fn mappings_that_do_not_fit_together_are_not_inherited() {
        let mut other = share(2, (50, 150), &[(60, 70, 1)]);
        other.mappings[0].flags = libc::MAP_NORESERVE;
        let shares = [share(1, (0, 100), &[]), other];
        let heritage = heritage(&[0, 1], &shares);
        assert_eq!(heritage.of(0).estates, [estate(0, 100)]);
    }

    #[test]
    fn a_tree_that_shares_nothing_has_no_heritage() {
        let shares = [share(1, (0, 100), &[]), share(2, (0, 100), &[])];
        assert!(heritage(&[0, 1], &shares).0.is_empty());
    }
}
