//! The identity of a read-only layer: whether another host's directory holds the same.

use serde::{Deserialize, Serialize};

/// What a read-only layer holds, in one digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity(pub String);
