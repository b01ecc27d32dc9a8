//! Namespaces of a tree that are not the host's, and what is in them (namespaces(7)).

use limosa_kernel::proc::{NsKind, ProcDir};
use serde::{Deserialize, Serialize};

use crate::error::{CaptureError, Refusal};
use crate::view::ProcessView;

/// The namespaces that a tree has of its own.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct NamespaceState {
    /// Their kinds, by the names in `/proc/PID/ns`.
    pub own: Vec<String>,
}

impl NamespaceState {
    /// What namespaces the tree with this root has of its own.
    pub fn capture(root: &ProcessView) -> Result<Self, CaptureError> {
        let host = ProcDir::open(std::process::id() as i32)?;
        let mut own = Vec::new();
        for kind in NsKind::ALL {
            match (root.proc.ns_id(kind), host.ns_id(kind)) {
                (Ok(theirs), Ok(ours)) if theirs != ours => own.push(kind.name().to_owned()),
                _ => {}
            }
        }
        if let Some(kind) = own.first() {
            let reason =
                format!("it lives in a {kind} namespace of its own, which this version cannot carry");
            return Err(Refusal::process(root.pid, reason, "checkpoint it from within its namespaces").into());
        }
        Ok(Self { own })
    }
}
