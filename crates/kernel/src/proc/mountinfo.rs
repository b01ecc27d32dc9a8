//! `/proc/PID/mountinfo`: the mounts that a process sees (`proc_pid_mountinfo(5)`).
//!
//! ```text
//! 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
//! id parent dev root point options  optional   type source    super options
//! ```

use super::text::{self, ParseError, Parsed};

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// ID, unique while it exists.
    pub id: i32,
    /// ID of the parent; its own when it is the root of its tree.
    pub parent: i32,
    /// `st_dev` of its files as (major, minor).
    pub dev: (u32, u32),
    /// Directory in the filesystem that is the mount's root.
    pub root: Vec<u8>,
    /// Where it is mounted, seen from the process's root directory.
    pub point: Vec<u8>,
    /// Options of the mount, separated by commas.
    pub options: Vec<u8>,
    /// Peer group when it is shared.
    pub shared: Option<u32>,
    /// Peer group it receives from when it is a slave.
    pub master: Option<u32>,
    /// Nearest dominant peer group under the process's root that it receives from.
    pub propagate_from: Option<u32>,
    /// Whether it cannot be bind-mounted.
    pub unbindable: bool,
    /// Filesystem type, `TYPE` or `TYPE.SUBTYPE`.
    pub fs_type: Vec<u8>,
    /// What is mounted, `none` often.
    pub source: Vec<u8>,
    /// Options of the superblock, separated by commas.
    pub super_options: Vec<u8>,
}

/// Parses `/proc/PID/mountinfo`.
pub fn parse_mountinfo(file: &[u8]) -> Parsed<Vec<Mount>> {
    text::lines(file).map(Mount::parse).collect()
}

impl Mount {
    /// One line. Fields are separated by single spaces and may be empty (a source of "").
    fn parse(line: &[u8]) -> Parsed<Self> {
        let bad = |what| ParseError::new(what, line);
        let mut fields = line.split(|&byte| byte == b' ');
        let mut next = |what| fields.next().ok_or_else(|| bad(what));
        let id = text::decimal(next("mount ID")?, "mount ID")?;
        let parent = text::decimal(next("parent's mount ID")?, "parent's mount ID")?;
        let (major, minor) = text::split_once(next("device")?, b':').ok_or_else(|| bad("device"))?;
        let mut mount = Self {
            id,
            parent,
            dev: (text::decimal(major, "device")?, text::decimal(minor, "device")?),
            root: plain(next("root")?),
            point: plain(next("mount point")?),
            options: plain(next("mount options")?),
            shared: None,
            master: None,
            propagate_from: None,
            unbindable: false,
            fs_type: Vec::new(),
            source: Vec::new(),
            super_options: Vec::new(),
        };
        loop {
            match next("separator -")? {
                b"-" => break,
                tag => mount.tag(tag)?,
            }
        }
        mount.fs_type = plain(next("filesystem type")?);
        mount.source = plain(next("source")?);
        mount.super_options = plain(next("superblock options")?);
        Ok(mount)
    }

    /// An optional field. Those of later kernels are skipped, as the manual page asks.
    fn tag(&mut self, tag: &[u8]) -> Parsed<()> {
        match text::key_value(tag) {
            Some((b"shared", group)) => self.shared = Some(text::decimal(group, "shared")?),
            Some((b"master", group)) => self.master = Some(text::decimal(group, "master")?),
            Some((b"propagate_from", group)) => {
                self.propagate_from = Some(text::decimal(group, "propagate_from")?);
            }
            _ if tag == b"unbindable" => self.unbindable = true,
            _ => {}
        }
        Ok(())
    }
}

/// Without the kernel's escapes of blanks, newlines, backslashes and `#` (`fs/proc_namespace.c`); options
/// of some filesystems escape a few bytes more (`seq_show_option`), so any octal escape counts.
fn plain(field: &[u8]) -> Vec<u8> {
    text::unescape(field, |_| true).into_owned()
}
