//! Versions of the protocol.
//!
//! Each side offers, in its `Hello`, the range of versions it speaks; both compute the highest one that is in both
//! ranges, and the connection speaks that. No common version ends the connection with an error that names both ranges.
//!
//! Policy: the preamble, the frame's layout and `Hello` never change. A new optional field in a message needs no new
//! version: unknown fields are ignored and missing ones have a default. A new kind of message, a field that must be
//! understood, or another meaning of an old one needs a new version. A release speaks its own version and at least
//! the one before it, so that hosts can be upgraded one at a time, in either order.

use std::fmt;

/// The first version in which memory may be sent again, and be gone again ([`crate::frame::Kind::Gone`]): what pre-copy needs.
pub const SENDS_AGAIN: u32 = 2;

/// The versions that this build speaks.
pub const SPOKEN: VersionRange = VersionRange { lowest: 1, highest: 2 };

/// A range of protocol versions, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct VersionRange {
    /// The oldest version spoken.
    pub lowest: u32,
    /// The newest version spoken.
    pub highest: u32,
}

impl VersionRange {
    /// The highest version in both ranges. The same from either side.
    pub fn common(self, other: Self) -> Option<u32> {
        let highest = self.highest.min(other.highest);
        (highest >= self.lowest.max(other.lowest)).then_some(highest)
    }
}

impl fmt::Display for VersionRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.lowest == self.highest {
            write!(f, "{}", self.lowest)
        } else {
            write!(f, "{} to {}", self.lowest, self.highest)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::VersionRange;
    use proptest::prelude::*;

    fn range(lowest: u32, highest: u32) -> VersionRange {
        VersionRange { lowest, highest }
    }

    #[test]
    fn the_highest_common_version_is_chosen() {
        assert_eq!(range(1, 3).common(range(2, 5)), Some(3));
        assert_eq!(range(1, 1).common(range(1, 9)), Some(1));
        assert_eq!(range(1, 2).common(range(3, 4)), None);
        assert_eq!(range(5, 2).common(range(1, 9)), None, "an empty range has nothing in common with any");
    }

    proptest! {
        #[test]
        fn both_sides_choose_the_same(a in 0u32..20, b in 0u32..20, c in 0u32..20, d in 0u32..20) {
            let (mine, theirs) = (range(a, b), range(c, d));
            prop_assert_eq!(mine.common(theirs), theirs.common(mine));
            if let Some(version) = mine.common(theirs) {
                prop_assert!((a..=b).contains(&version) && (c..=d).contains(&version));
            }
        }
    }
}
