//! Pages by address and the space that holds them: sets of them, and what can be done with those.

use limosa_image::SpaceId;
use serde::{Deserialize, Serialize};

/// Pages that are stored in `space` at their own addresses. In a checkpoint: a list of start, end and space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(from = "(u64, u64, SpaceId)", into = "(u64, u64, SpaceId)")]
pub struct Piece {
    /// Where they are stored.
    pub space: SpaceId,
    /// First address.
    pub start: u64,
    /// First address behind them.
    pub end: u64,
}

impl From<(u64, u64, SpaceId)> for Piece {
    fn from((start, end, space): (u64, u64, SpaceId)) -> Self {
        Self { space, start, end }
    }
}

impl From<Piece> for (u64, u64, SpaceId) {
    fn from(piece: Piece) -> Self {
        (piece.start, piece.end, piece.space)
    }
}

impl Piece {
    /// The part of it inside `start..end`, if there is one.
    pub fn within(self, start: u64, end: u64) -> Option<Self> {
        let part = Self { start: self.start.max(start), end: self.end.min(end), ..self };
        (part.start < part.end).then_some(part)
    }
}

/// A set of pages of several spaces: sorted by space and address; pieces neither overlap nor touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pieces(Vec<Piece>);

impl FromIterator<Piece> for Pieces {
    fn from_iter<T: IntoIterator<Item = Piece>>(pieces: T) -> Self {
        at_least(1, pieces.into_iter().collect())
    }
}

impl Pieces {
    /// The set without pages.
    pub const EMPTY: Self = Self(Vec::new());

    /// What is in at least two of `sets`.
    pub fn twice<'a>(sets: impl IntoIterator<Item = &'a Self>) -> Self {
        at_least(2, sets.into_iter().flat_map(|set| set.0.iter().copied()).collect())
    }

    /// The pieces, by space and address.
    pub fn iter(&self) -> impl Iterator<Item = Piece> + '_ {
        self.0.iter().copied()
    }

    /// The pieces of each space, by address.
    pub fn by_space(&self) -> impl Iterator<Item = (SpaceId, &[Piece])> {
        self.0.chunk_by(|a, b| a.space == b.space).filter_map(|same| Some((same.first()?.space, same)))
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What is in both.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        Self::twice([self, other])
    }

    /// What is in this set, and not in the other one.
    #[must_use]
    pub fn without(&self, other: &Self) -> Self {
        let mut left = Vec::with_capacity(self.0.len());
        for piece in &self.0 {
            let mut start = piece.start;
            let first = other.0.partition_point(|other| (other.space, other.end) <= (piece.space, start));
            let same = other.0[first..].iter().take_while(|other| other.space == piece.space);
            for other in same.take_while(|other| other.start < piece.end) {
                left.extend(piece.within(start, other.start));
                start = start.max(other.end);
            }
            left.extend(piece.within(start, piece.end));
        }
        Self(left)
    }

    /// What is in this set, at addresses that are not in `ranges`, which are sorted and disjoint.
    #[must_use]
    pub fn outside_of(&self, ranges: &[(u64, u64)]) -> Self {
        let mut left = Vec::with_capacity(self.0.len());
        for piece in &self.0 {
            let mut start = piece.start;
            let first = ranges.partition_point(|(_, end)| *end <= piece.start);
            for (from, to) in ranges[first..].iter().take_while(|(from, _)| *from < piece.end) {
                left.extend(piece.within(start, *from));
                start = start.max(*to);
            }
            left.extend(piece.within(start, piece.end));
        }
        Self(left)
    }

    /// What is in this set, at addresses in `ranges`, which are sorted and disjoint.
    #[must_use]
    pub fn inside_of(&self, ranges: &[(u64, u64)]) -> Self {
        let inside = |piece: &Piece| {
            let first = ranges.partition_point(|(_, end)| *end <= piece.start);
            let hit = ranges[first..].iter().take_while(|(from, _)| *from < piece.end);
            hit.filter_map(|(from, to)| piece.within(*from, *to)).collect::<Vec<_>>()
        };
        Self(self.0.iter().flat_map(inside).collect())
    }

    /// The parts of the pieces of `space` from the address `start` to `end`.
    pub fn within(&self, space: SpaceId, start: u64, end: u64) -> impl Iterator<Item = Piece> + '_ {
        let first = self.0.partition_point(|piece| (piece.space, piece.end) <= (space, start));
        let there = move |piece: &&Piece| piece.space == space && piece.start < end;
        self.0[first..].iter().take_while(there).filter_map(move |piece| piece.within(start, end))
    }

    /// The addresses of all pieces, sorted and disjoint.
    pub fn addresses(&self) -> Vec<(u64, u64)> {
        let mut ranges: Vec<_> = self.0.iter().map(|piece| (piece.start, piece.end)).collect();
        ranges.sort_unstable();
        let mut joined: Vec<(u64, u64)> = Vec::with_capacity(ranges.len());
        for (start, end) in ranges {
            match joined.last_mut() {
                Some(last) if last.1 >= start => last.1 = last.1.max(end),
                _ => joined.push((start, end)),
            }
        }
        joined
    }

    /// The same, with one space for each address: `first`'s where it has pages there, else the one of the lowest number.
    #[must_use]
    pub fn one_each(&self, first: Option<SpaceId>) -> Self {
        let mut taken = Self::default();
        let spaces = self.0.chunk_by(|a, b| a.space == b.space);
        let mut spaces: Vec<&[Piece]> = spaces.collect();
        spaces.sort_by_key(|pieces| pieces.first().is_some_and(|piece| Some(piece.space) != first));
        for pieces in spaces {
            let free = Self(pieces.to_vec()).outside_of(&taken.addresses());
            taken = taken.iter().chain(free.iter()).collect();
        }
        taken
    }
}

/// What is in at least `count` of `pieces`.
fn at_least(count: i32, pieces: Vec<Piece>) -> Pieces {
    let mut edges: Vec<(SpaceId, u64, i32)> = Vec::with_capacity(pieces.len() * 2);
    for piece in pieces.into_iter().filter(|piece| piece.start < piece.end) {
        edges.push((piece.space, piece.start, -1));
        edges.push((piece.space, piece.end, 1));
    }
    // Beginnings come before ends at the same address, so that pieces that touch become one.
    edges.sort_unstable();
    let (mut result, mut depth, mut start) = (Vec::new(), 0, 0);
    for (space, address, edge) in edges {
        let before = depth;
        depth -= edge;
        if before < count && depth >= count {
            start = address;
        } else if before >= count && depth < count && start < address {
            result.push(Piece { space, start, end: address });
        }
    }
    Pieces(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(list: &[(u32, u64, u64)]) -> Pieces {
        list.iter()
            .map(|(space, start, end)| Piece { space: SpaceId(*space), start: *start, end: *end })
            .collect()
    }

    #[test]
    fn pieces_that_touch_or_overlap_become_one() {
        assert_eq!(pieces(&[(1, 5, 9), (1, 0, 3), (1, 3, 6), (2, 0, 1)]), pieces(&[(1, 0, 9), (2, 0, 1)]));
        assert_eq!(pieces(&[(1, 5, 9), (1, 0, 3), (1, 3, 6), (2, 0, 1)]).iter().count(), 2);
        assert!(pieces(&[(1, 4, 4), (1, 9, 3)]).is_empty());
    }

    #[test]
    fn what_several_sets_hold() {
        let (a, b, c) =
            (pieces(&[(1, 0, 9), (2, 0, 9)]), pieces(&[(1, 4, 20)]), pieces(&[(1, 9, 12), (3, 0, 9)]));
        assert_eq!(a.and(&b), pieces(&[(1, 4, 9)]));
        assert_eq!(Pieces::twice([&a, &b, &c]), pieces(&[(1, 4, 12)]));
        assert!(a.and(&c).is_empty(), "they only touch");
        assert_eq!(a.without(&b), pieces(&[(1, 0, 4), (2, 0, 9)]));
        assert_eq!(
            pieces(&[(1, 0, 9)]).without(&pieces(&[(1, 2, 3), (1, 5, 6)])),
            pieces(&[(1, 0, 2), (1, 3, 5), (1, 6, 9)])
        );
    }

    #[test]
    fn a_part_of_one_space() {
        let all = pieces(&[(1, 0, 9), (2, 0, 3), (2, 5, 9), (2, 12, 14), (3, 0, 9)]);
        assert_eq!(
            all.within(SpaceId(2), 2, 13).collect::<Pieces>(),
            pieces(&[(2, 2, 3), (2, 5, 9), (2, 12, 13)])
        );
        assert_eq!(all.within(SpaceId(2), 3, 5).count(), 0);
        assert_eq!(all.within(SpaceId(4), 0, 99).count(), 0);
    }

    #[test]
    fn addresses_cut_all_spaces() {
        let all = pieces(&[(1, 0, 9), (2, 4, 12)]);
        assert_eq!(all.addresses(), [(0, 12)]);
        assert_eq!(
            all.outside_of(&[(2, 3), (8, 10)]),
            pieces(&[(1, 0, 2), (1, 3, 8), (2, 4, 8), (2, 10, 12)])
        );
        assert_eq!(all.inside_of(&[(2, 3), (8, 10)]), pieces(&[(1, 2, 3), (1, 8, 9), (2, 8, 10)]));
    }

    #[test]
    fn each_address_gets_one_space() {
        let all = pieces(&[(1, 0, 9), (2, 4, 12)]);
        assert_eq!(all.one_each(None), pieces(&[(1, 0, 9), (2, 9, 12)]));
        assert_eq!(all.one_each(Some(SpaceId(2))), pieces(&[(1, 0, 4), (2, 4, 12)]));
    }
}
