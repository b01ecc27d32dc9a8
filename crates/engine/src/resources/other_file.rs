//! Files that Limosa does not carry: each is refused by its name, with the reason and what to do.

use std::os::fd::OwnedFd;

use rustix::fs::FileType;
use serde::{Deserialize, Serialize};

use super::{CaptureContext, DescriptorKind, RebuildContext};
use crate::error::{CaptureError, RestoreError};
use crate::view::DescriptionView;

/// A file without a room. There is none in any checkpoint.
#[derive(Debug, Serialize, Deserialize)]
pub struct OtherFile {
    never: Never,
}

/// A value that cannot be.
#[derive(Debug, Serialize, Deserialize)]
enum Never {}

impl DescriptorKind for OtherFile {
    fn recognise(_: &DescriptionView) -> bool {
        true
    }

    fn capture(view: &DescriptionView, _: &mut CaptureContext) -> Result<Self, CaptureError> {
        let device = (rustix::fs::major(view.stat.st_rdev), rustix::fs::minor(view.stat.st_rdev));
        let (reason, remedy) = match FileType::from_raw_mode(view.stat.st_mode) {
            FileType::CharacterDevice => of_device(device),
            FileType::BlockDevice => {
                let reason = format!("it is block device {}:{} of this machine", device.0, device.1);
                (reason, "have the process close it; a container's storage is its files")
            }
            _ => of_link(&view.link),
        };
        Err(view.refuse(reason, remedy).into())
    }

    fn examine(view: &DescriptionView, context: &mut CaptureContext) -> Result<(), CaptureError> {
        Self::capture(view, context).map(drop)
    }

    fn rebuild(&self, _: u32, _: &mut RebuildContext) -> Result<OwnedFd, RestoreError> {
        match self.never {}
    }
}

const CLOSE: &str = "have the process close it before the checkpoint";

/// Character devices by number (`Documentation/admin-guide/devices.txt` of the kernel).
fn of_device(device: (u32, u32)) -> (String, &'static str) {
    let (what, remedy) = match device {
        (1, 11) => ("the kernel's log, which is this machine's", CLOSE),
        (5, 1) => ("the system console, which is this machine's", "redirect it to a file or a pseudo-terminal"),
        (10, 200) => (
            "a TUN/TAP device, whose interface belongs to this process and machine",
            "end the VPN or emulator that made it",
        ),
        (10, 229) => ("the kernel's end of a FUSE filesystem", "unmount that filesystem and end its server"),
        (10, 232) => ("/dev/kvm", "migrate the virtual machine by its own monitor"),
        (10, 237) => ("the control device of loop devices", CLOSE),
        (10, 238 | 241) => ("a vhost device", "migrate the virtual machine by its own monitor"),
        (13, _) => ("an input device of this machine", CLOSE),
        (29 | 226, _) => ("a graphics device of this machine", "end its use of the graphics processor"),
        (116, _) => ("a sound device of this machine", CLOSE),
        (195, _) => ("a graphics processor of this machine", "end its use of the graphics processor"),
        (major, minor) => {
            return (format!("it is character device {major}:{minor} of this machine"), CLOSE);
        }
    };
    (format!("it is {what}"), remedy)
}

/// What the kernel calls files without a path.
fn of_link(link: &[u8]) -> (String, &'static str) {
    let is = |name: &str| link == format!("anon_inode:{name}").as_bytes();
    let (what, remedy) = if is("[userfaultfd]") {
        ("a userfaultfd, whose waiting faults the kernel does not give out", "end the use of userfaultfd first")
    } else if is("[io_uring]") {
        (
            "an io_uring, whose requests are in the kernel's hands",
            "run the program without io_uring (most have a switch for it)",
        )
    } else if is("[perf_event]") {
        ("a performance counter of this machine", "end the measurement (perf, profiler) first")
    } else if link.starts_with(b"anon_inode:bpf") || is("btf") {
        ("an object of the kernel's BPF machine", "detach the BPF program and end its loader first")
    } else if is("[fanotify]") {
        ("a fanotify group, whose marks and unread events the kernel does not give out", CLOSE)
    } else if is("seccomp notify") {
        (
            "the listener of a seccomp filter, which only the filter's making gives out",
            "checkpoint the supervised process and its supervisor without that filter",
        )
    } else if is("[landlock-ruleset]") {
        ("a set of Landlock rules, which the kernel does not give out", CLOSE)
    } else if link.starts_with(b"anon_inode:kvm") {
        ("part of a virtual machine", "migrate the virtual machine by its own monitor")
    } else if is("[fscontext]") {
        ("a mount that is being prepared", "try again when it is mounted")
    } else if link == b"/secretmem (deleted)" {
        ("secret memory (memfd_secret), which nobody but its process may read", CLOSE)
    } else if link.starts_with(b"/dmabuf:") || is("sync_file") {
        ("a buffer that a device of this machine shares", "end its use of the graphics processor")
    } else if is_namespace(link) {
        ("a descriptor of a namespace", CLOSE)
    } else {
        ("a kind of file that Limosa does not know", CLOSE)
    };
    (format!("it is {what}"), remedy)
}

/// `net:[4026531840]` and the like.
fn is_namespace(link: &[u8]) -> bool {
    limosa_kernel::proc::NsKind::ALL.iter().any(|kind| {
        link.strip_prefix(kind.name().as_bytes()).is_some_and(|number| number.starts_with(b":["))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_refused_is_called_by_its_name() {
        let said = |link: &[u8]| of_link(link).0;
        assert!(said(b"anon_inode:[io_uring]").contains("io_uring"));
        assert!(said(b"anon_inode:bpf-map").contains("BPF"));
        assert!(said(b"net:[4026531840]").contains("namespace"));
        assert!(said(b"anon_inode:[new]").contains("does not know"));
        assert!(of_device((10, 232)).0.contains("kvm") && of_device((250, 1)).0.contains("250:1"));
    }
}
