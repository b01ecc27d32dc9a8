//! Netlink sockets (netlink(7)) of the protocols that programs in containers use: routes, `sock_diag`, uevents, and generic
//! netlink; with their port ID, groups, options and where they are connected to. A socket of another protocol is what the
//! kernel has registered for it.
//!
//! Messages that are not read cannot be put into a socket again: nobody but the kernel can send in the kernel's name. A socket
//! that has joined groups has missed what happened between the checkpoint and the restore anyway, and is told so as netlink(7)
//! has it: its next read gives `ENOBUFS`, whereupon a program asks for the whole state anew, unless it has said that it does not
//! want that (`NETLINK_NO_ENOBUFS`). A socket without groups can only have answers in its queue, which its program waits
//! for: that is refused, and gone a moment later.
//!
//! Generic netlink numbers families and groups as they come. Groups are joined by name; the numbers of families, which
//! programs keep, must be the same at the restore.

use std::os::fd::OwnedFd;

use limosa_kernel::net::netlink_socket::{self, Family};
use limosa_kernel::net::sockopt::{self, Phase};
use limosa_kernel::net::{InNetns, raw};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, Protocol, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};

use super::{CaptureContext, DescriptorKind, RebuildContext};
use crate::error::{CaptureError, RestoreError};
use crate::network::{self, OptionState};
use crate::view::DescriptionView;

const ROUTE: i32 = 0;
const SOCK_DIAG: i32 = 4;
const UEVENT: i32 = 15;
const GENERIC: i32 = 16;
const SOL_NETLINK: i32 = 270;
const NETLINK_NO_ENOBUFS: i32 = 5;

/// A netlink socket.
#[derive(Debug, Serialize, Deserialize)]
pub struct Netlink {
    /// `NETLINK_ROUTE` (0), `NETLINK_SOCK_DIAG` (4), `NETLINK_KOBJECT_UEVENT` (15) or `NETLINK_GENERIC` (16).
    pub protocol: i32,
    /// `SOCK_RAW` or `SOCK_DGRAM`, which are the same.
    pub kind: u32,
    /// Its port ID; 0 where it has none yet.
    pub port: u32,
    /// Where it is connected to: a port ID and a set of groups; 0 and 0 for the kernel, as in a new socket.
    pub peer: (u32, u32),
    /// The groups that it has joined, by number; not of generic netlink.
    pub groups: Vec<u32>,
    /// The options that differ from a new socket's.
    pub options: Vec<OptionState>,
    /// Of generic netlink: the groups by the names of family and group, and the families with their numbers.
    pub generic: Option<Generic>,
}

/// What generic netlink has numbers for.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Generic {
    /// The groups that the socket has joined: family, group.
    pub groups: Vec<(String, String)>,
    /// The families of the kernel: name, number.
    pub families: Vec<(String, u16)>,
}

impl DescriptorKind for Netlink {
    fn recognise(view: &DescriptionView) -> bool {
        network::kind(view).is_some_and(|kind| kind.domain == libc::AF_NETLINK)
    }

    fn capture(view: &DescriptionView, context: &mut CaptureContext) -> Result<Self, CaptureError> {
        let kind = raw::kind(&view.descriptor)?;
        if ![ROUTE, SOCK_DIAG, UEVENT, GENERIC].contains(&kind.protocol) {
            let reason = format!(
                "it is a netlink socket of protocol {}, in which the kernel keeps more than it gives out",
                kind.protocol
            );
            return Err(view.refuse(reason, "have the process close it and try again").into());
        }
        context.network.refuse_foreign(view)?;
        let joined = netlink_socket::memberships(&view.descriptor)?;
        if joined.is_empty() && has_messages(view)? {
            let reason = "it has answers of the kernel that are not read, which nobody can put into it again";
            return Err(view.refuse(reason, "let the process read them, and try again").into());
        }
        let (generic, groups) = match kind.protocol {
            GENERIC => (Some(Generic::of(view, &joined)?), Vec::new()),
            _ => (None, joined),
        };
        Ok(Self {
            protocol: kind.protocol,
            kind: kind.kind as u32,
            port: netlink_socket::port(&view.descriptor)?,
            peer: netlink_socket::peer(&view.descriptor)?,
            groups,
            options: network::to_state(sockopt::capture(&view.descriptor)?),
            generic,
        })
    }

    fn examine(view: &DescriptionView, context: &mut CaptureContext) -> Result<(), CaptureError> {
        Self::capture(view, context).map(drop)
    }

    fn rebuild(&self, _: u32, _: &mut RebuildContext) -> Result<OwnedFd, RestoreError> {
        let kind = match self.kind as i32 {
            libc::SOCK_RAW => SocketType::RAW,
            libc::SOCK_DGRAM => SocketType::DGRAM,
            kind => return Err(RestoreError::inconsistent(format!("a netlink socket of type {kind}"))),
        };
        if ![ROUTE, SOCK_DIAG, UEVENT, GENERIC].contains(&self.protocol) {
            return Err(RestoreError::inconsistent(format!("a netlink socket of protocol {}", self.protocol)));
        }
        // The protocol 0 is that of routes.
        let protocol = std::num::NonZeroU32::new(self.protocol as u32).map(Protocol::from_raw);
        let socket = rustix::net::socket_with(AddressFamily::NETLINK, kind, SocketFlags::CLOEXEC, protocol)
            .map_err(RestoreError::rebuild("a netlink socket", "socket"))?;
        let options = network::from_state(&self.options);
        sockopt::apply(&socket, &options, Phase::BeforeBind)?;
        if self.port != 0 {
            netlink_socket::bind(&socket, self.port).map_err(|error| RestoreError::Unsupported {
                what: format!("the netlink socket with port ID {} of protocol {}", self.port, self.protocol),
                why: format!("{}; if another process has that ID, end it and try again", error.source),
            })?;
        }
        // Before it is connected, when it takes messages from the kernel only, and before it is in its groups.
        let groups = self.numbers()?;
        if !groups.is_empty() && !self.wants_no_overruns() {
            if self.port == 0 {
                tracing::warn!("a netlink socket without a port ID is not told that it has missed messages");
            } else {
                netlink_socket::overrun(&socket, self.port)?;
            }
        }
        groups.into_iter().try_for_each(|group| netlink_socket::join(&socket, group))?;
        if self.peer != (0, 0) {
            netlink_socket::connect(&socket, self.peer)?;
        }
        sockopt::apply(&socket, &options, Phase::Last)?;
        Ok(socket)
    }
}

impl Netlink {
    /// The groups that it joins, as they are numbered here.
    fn numbers(&self) -> Result<Vec<u32>, RestoreError> {
        match &self.generic {
            Some(generic) if self.protocol == GENERIC => generic.numbers(&netlink_socket::families()?),
            _ => Ok(self.groups.clone()),
        }
    }

    fn wants_no_overruns(&self) -> bool {
        self.options.iter().any(|option| {
            (option.level, option.name) == (SOL_NETLINK, NETLINK_NO_ENOBUFS)
                && option.value.iter().any(|byte| *byte != 0)
        })
    }
}

impl Generic {
    /// The names of the groups that a socket has joined.
    fn of(view: &DescriptionView, joined: &[u32]) -> Result<Self, CaptureError> {
        let families = {
            let _inside = InNetns::enter(raw::namespace(&view.descriptor)?)?;
            netlink_socket::families()?
        };
        let name = |number: &u32| {
            let mut all = families.iter().flat_map(|family| family.groups.iter().map(move |group| (family, group)));
            let found = all.find(|(_, (_, id))| id == number);
            found.map(|(family, (group, _))| (family.name.clone(), group.clone())).ok_or_else(|| {
                let reason = format!("it has joined group {number} of generic netlink, which belongs to no family");
                view.refuse(reason, "have the process close it and try again")
            })
        };
        Ok(Self {
            groups: joined.iter().map(name).collect::<Result<_, _>>()?,
            families: families.iter().map(|family| (family.name.clone(), family.id)).collect(),
        })
    }

    /// The numbers of the groups among the `families` of this kernel, whose own numbers must be what they were.
    fn numbers(&self, families: &[Family]) -> Result<Vec<u32>, RestoreError> {
        let named = |wanted: &str| families.iter().find(|family| family.name == wanted);
        for (name, id) in &self.families {
            let here = named(name).map(|family| family.id);
            let taken = || families.iter().find(|family| family.id == *id).map(|family| &family.name);
            let why = match (here, taken()) {
                (Some(here), _) if here != *id => format!("it has number {here} here, and had {id} at the checkpoint"),
                (None, Some(other)) => format!("it had number {id} at the checkpoint, which {other} has here"),
                _ => continue,
            };
            return Err(RestoreError::Unsupported { what: format!("family {name} of generic netlink"), why });
        }
        let number = |(family, group): &(String, String)| {
            let found = named(family).and_then(|family| family.groups.iter().find(|(name, _)| name == group));
            found.map(|(_, number)| *number).ok_or_else(|| RestoreError::Unsupported {
                what: format!("the membership of group {group} of generic netlink's family {family}"),
                why: "this kernel has no such group; load the module that has, and try again".into(),
            })
        };
        self.groups.iter().map(number).collect()
    }
}

/// Whether there is something to read, or the news that something was lost.
fn has_messages(view: &DescriptionView) -> Result<bool, CaptureError> {
    let mut polled = [PollFd::new(&view.descriptor, PollFlags::IN)];
    poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).map_err(view.error("poll of a netlink socket"))?;
    Ok(polled[0].revents().intersects(PollFlags::IN | PollFlags::ERR))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_must_have_the_numbers_that_programs_know() {
        let family = |name: &str, id, group: &str, number| Family {
            name: name.into(),
            id,
            groups: vec![(group.into(), number)],
        };
        let generic = Generic {
            groups: vec![("nl80211".into(), "scan".into())],
            families: vec![("nlctrl".into(), 16), ("nl80211".into(), 30)],
        };
        let control = family("nlctrl", 16, "notify", 16);
        let numbers = |others: &[Family]| generic.numbers(&[std::slice::from_ref(&control), others].concat()).ok();
        assert_eq!(numbers(&[family("nl80211", 30, "scan", 9)]), Some(vec![9]));
        assert_eq!(numbers(&[family("nl80211", 31, "scan", 9)]), None);
        assert_eq!(numbers(&[family("nl80211", 30, "config", 9)]), None);
        assert_eq!(numbers(&[family("ethtool", 30, "monitor", 9)]), None);
        assert_eq!(numbers(&[]), None);
    }
}
