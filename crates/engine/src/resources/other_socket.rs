//! Sockets that Limosa does not carry: each is refused, with the reason and what to do.

use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

use super::{CaptureContext, DescriptorKind, RebuildContext};
use crate::error::{CaptureError, RestoreError};
use crate::network;
use crate::view::DescriptionView;

/// A socket of a family without a room. There is none in any checkpoint.
#[derive(Debug, Serialize, Deserialize)]
pub struct OtherSocket {
    never: Never,
}

/// A value that cannot be.
#[derive(Debug, Serialize, Deserialize)]
enum Never {}

impl DescriptorKind for OtherSocket {
    fn recognise(view: &DescriptionView) -> bool {
        view.link.starts_with(b"socket:[")
    }

    fn capture(view: &DescriptionView, _context: &mut CaptureContext) -> Result<Self, CaptureError> {
        let (domain, kind) = network::kind(view).map_or((-1, -1), |kind| (kind.domain, kind.kind));
        let (reason, remedy) = refusal(domain, kind);
        Err(view.refuse(reason, remedy).into())
    }

    fn examine(view: &DescriptionView, context: &mut CaptureContext) -> Result<(), CaptureError> {
        Self::capture(view, context).map(drop)
    }

    fn rebuild(&self, _flags: u32, _context: &mut RebuildContext) -> Result<OwnedFd, RestoreError> {
        match self.never {}
    }
}

fn refusal(domain: i32, kind: i32) -> (String, &'static str) {
    match domain {
        libc::AF_PACKET => (
            "it is a packet socket, whose filter and rings belong to this machine's interfaces".into(),
            "stop the capture (tcpdump, DHCP client) in the container and try again",
        ),
        libc::AF_VSOCK => (
            "it is a vsock socket, whose peer is this machine's hypervisor".into(),
            "use TCP to the hypervisor, or close the connection and try again",
        ),
        libc::AF_INET | libc::AF_INET6 if kind == libc::SOCK_RAW => (
            "it is a raw socket".into(),
            "have the process close it (ping and traceroute open it for themselves) and try again",
        ),
        libc::AF_INET | libc::AF_INET6 => (
            "it is an internet socket of a protocol other than TCP and UDP (SCTP, MPTCP, ping…)".into(),
            "use TCP or UDP, or close it and try again",
        ),
        -1 => ("it is a socket that does not say its kind".into(), "close it and try again"),
        family => (
            format!("it is a socket of family {family}, which Limosa does not know"),
            "close it and try again",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_has_a_reason_and_a_remedy() {
        for domain in -1..50 {
            let (reason, remedy) = refusal(domain, libc::SOCK_RAW);
            assert!(!reason.is_empty() && remedy.contains("close") || remedy.contains("stop"));
        }
    }
}
