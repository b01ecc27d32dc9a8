//! Credentials: users, groups, capabilities, securebits and `no_new_privs` of a process, and another user in one of its
//! threads.

use std::fmt::Write as _;
use std::fs;
use std::sync::mpsc::channel;
use std::thread;

use anyhow::{Context, Result, ensure};
use rustix::fs::{Gid, Uid};
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets};
use rustix::thread::{capabilities_secure_bits, set_capabilities, set_capabilities_secure_bits};
use rustix::thread::{configure_capability_in_ambient_set, remove_capability_from_bounding_set};
use rustix::thread::{get_keep_capabilities, set_no_new_privs};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

use super::{Setting, Verify};
use crate::sys;

pub fn set_up(_: &Setting) -> Result<Box<Verify>> {
    remove_capability_from_bounding_set(CapabilitySet::SYS_MODULE).context("dropping a capability")?;
    remove_capability_from_bounding_set(CapabilitySet::SYS_TIME)?;
    let (groups, ids) = ([5000, 5001].map(Gid::from_raw), [1000, 1001, 1002].map(Gid::from_raw));
    set_thread_groups(&groups).context("setgroups")?;
    set_thread_res_gid(ids[0], ids[1], ids[2]).context("setresgid")?;

    // A thread that becomes its own user before the process gives up the right to.
    let (ready, is_ready) = channel();
    thread::Builder::new().name("other-user".into()).spawn(move || {
        let outcome = become_user([3000, 3001, 3002]);
        let _ = ready.send(outcome);
        loop {
            thread::park();
        }
    })?;
    is_ready.recv().context("the second thread ended")??;

    let bits = CapabilitiesSecureBits::NO_SETUID_FIXUP | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED;
    set_capabilities_secure_bits(bits).context("setting securebits")?;
    become_user([2000, 2001, 2002])?;
    let inheritable = CapabilitySet::NET_BIND_SERVICE | CapabilitySet::KILL;
    set_capabilities(
        None,
        CapabilitySets {
            effective: CapabilitySet::CHOWN,
            permitted: CapabilitySet::CHOWN | CapabilitySet::NET_BIND_SERVICE | CapabilitySet::FOWNER,
            inheritable,
        },
    )
    .context("capset")?;
    configure_capability_in_ambient_set(CapabilitySet::NET_BIND_SERVICE, true).context("ambient set")?;
    set_no_new_privs(true)?;
    set_dumpable_behavior(DumpableBehavior::Dumpable)?;

    let described = describe()?;
    Ok(Box::new(move || {
        sys::compare_lines("credentials", &describe()?, &described)?;
        ensure!(fs::read("/etc/shadow").is_err(), "a user without privileges reads /etc/shadow");
        Ok(String::new())
    }))
}

fn become_user([real, effective, saved]: [u32; 3]) -> Result<()> {
    let user = Uid::from_raw;
    set_thread_res_uid(user(real), user(effective), user(saved)).context("setresuid")
}

/// The lines of each thread's `/proc/self/task/TID/status` that tell of credentials, in order of thread ids.
pub fn describe() -> Result<String> {
    let mut threads: Vec<_> = fs::read_dir("/proc/self/task")?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()?;
    threads.sort();
    let mut text = format!(
        "securebits {:?} keep-capabilities {} dumpable {:?}\n",
        capabilities_secure_bits()?,
        get_keep_capabilities()?,
        rustix::process::dumpable_behavior()?
    );
    for thread in threads {
        let status = fs::read_to_string(thread.join("status"))?;
        let kept = ["Uid", "Gid", "Groups", "Cap", "NoNewPrivs", "Seccomp"];
        for line in status.lines().filter(|line| kept.iter().any(|field| line.starts_with(field))) {
            let _ = writeln!(text, "{} {line}", thread.display());
        }
    }
    Ok(text)
}
