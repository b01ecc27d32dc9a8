//! How a thread is scheduled: policy and priority (sched_setattr(2)), processors, I/O priority, timer slack;
//! from which nodes its memory comes (set_mempolicy(2)); the nice value of its session (sched(7), "The autogroup
//! feature").
//!
//! A thread that could run on every processor can so after a restore, however
//! many there are.

use limosa_kernel::task::{self, SchedulingAttributes};
use limosa_puppet::{CallId, Data, Outcome, Program};
use serde::{Deserialize, Serialize};

use super::ThreadAttribute;
use crate::error::{CaptureError, RestoreError};
use crate::view::ThreadView;

/// First published size of `struct sched_attr`, and the one with utilization clamps.
const ATTRIBUTES_SIZE: u64 = 48;
const CLAMPED_SIZE: u64 = 56;
/// `SCHED_FLAG_UTIL_CLAMP_MIN | SCHED_FLAG_UTIL_CLAMP_MAX`
const CLAMP: u64 = 0x60;
/// The clamps of a thread that has none; of a real-time one; and of a kernel without them (`CONFIG_UCLAMP_TASK`).
const NO_CLAMPS: [(u32, u32); 3] = [(0, 1024), (1024, 1024), (0, 0)];
/// Words of the mask of all nodes, as many as the kernel can have (1024).
const NODE_WORDS: usize = 16;
/// `MPOL_DEFAULT`, and the bits of a policy that are not flags; `MPOL_LOCAL` has no nodes.
const MPOL_DEFAULT: u32 = 0;
const IOPRIO_WHO_PROCESS: i32 = 1;
/// Words of the mask of all processors, as many as the kernel can have (8192).
const ALL: usize = 128;

/// A thread's scheduling.
#[derive(Debug, Serialize, Deserialize)]
pub struct Scheduling {
    /// `SCHED_*`
    pub policy: u32,
    /// `SCHED_FLAG_*`
    pub flags: u64,
    /// Nice value.
    pub nice: i32,
    /// Real-time priority.
    pub priority: u32,
    /// Run time, deadline and period in nanoseconds; for fair policies the slice, if it was chosen (6.12).
    pub times: [u64; 3],
    /// Processors, 64 in each word; none for all.
    pub processors: Option<Vec<u64>>,
    /// As ioprio_get(2) encodes it.
    pub io_priority: u32,
    /// Lower and upper utilization clamp, if they were chosen.
    #[serde(default)]
    pub clamps: Option<(u32, u32)>,
    /// Nanoseconds by which the kernel may delay a timer.
    pub timer_slack: u64,
    /// Where new memory comes from, if it was chosen: `MPOL_*`, and nodes, 64 in each word.
    #[serde(default)]
    pub memory_nodes: Option<(u32, Vec<u64>)>,
    /// The nice value of the session that the process leads.
    #[serde(default)]
    pub session_nice: Option<i32>,
}

/// Where the answers will be.
pub struct Asked {
    slack: CallId,
    memory_policy: (CallId, Data, Data),
}

impl ThreadAttribute for Scheduling {
    type Asked = Asked;

    fn ask(_: &ThreadView, program: &mut Program) -> Result<Asked, CaptureError> {
        let slack = program.call("ask for the timer slack", libc::SYS_prctl, [libc::PR_GET_TIMERSLACK.into()]);
        let (policy, nodes) = (program.space(8), program.space(NODE_WORDS * 8));
        let arguments = [policy.into(), nodes.into(), (NODE_WORDS * 64).into(), 0.into(), 0.into()];
        // Fails where the kernel has no memory policies (CONFIG_NUMA).
        let asked = program.try_call("ask where memory comes from", libc::SYS_get_mempolicy, arguments);
        Ok(Asked { slack, memory_policy: (asked, policy, nodes) })
    }

    fn capture(thread: &ThreadView, asked: &Asked, outcome: &Outcome) -> Result<Self, CaptureError> {
        let question = |source| CaptureError::Question { pid: thread.process.pid, source };
        let SchedulingAttributes { policy, flags, nice, priority, mut runtime, deadline, period, util_min, util_max, .. } =
            task::scheduling(thread.tid)?;
        // The slice that everyone has was not chosen, and is another one on another machine.
        if is_fair(policy) && is_default_slice(runtime) {
            runtime = 0;
        }
        let processors = task::affinity(thread.tid)?;
        let all = covers(&processors, &online("cpu"));
        Ok(Self {
            policy,
            flags,
            nice,
            priority,
            times: [runtime, deadline, period],
            processors: (!all).then_some(processors),
            clamps: Some((util_min, util_max)).filter(|clamps| !NO_CLAMPS.contains(clamps)),
            io_priority: task::io_priority(thread.tid)?,
            timer_slack: outcome.result(asked.slack).map_err(question)?,
            memory_nodes: memory_nodes(asked, outcome),
            session_nice: session_nice(thread),
        })
    }

    fn rebuild(&self, program: &mut Program) {
        self.choose_processors(program);
        let low = |word: u32| u64::from(word);
        let attributes = program.words(&[
            ATTRIBUTES_SIZE | low(self.policy) << 32,
            self.flags,
            low(self.nice as u32) | low(self.priority) << 32,
            self.times[0],
            self.times[1],
            self.times[2],
        ]);
        let arguments = [0.into(), attributes.into(), 0.into()];
        program.call("set the scheduling policy", libc::SYS_sched_setattr, arguments);
        self.clamp(program);
        if self.io_priority != 0 {
            let arguments = [IOPRIO_WHO_PROCESS.into(), 0.into(), self.io_priority.into()];
            program.call("set the I/O priority", libc::SYS_ioprio_set, arguments);
        }
        let arguments = [libc::PR_SET_TIMERSLACK.into(), self.timer_slack.into()];
        program.call("set the timer slack", libc::SYS_prctl, arguments);
        self.choose_memory_nodes(program);
    }

    fn finish(&self, tid: i32) -> Result<(), RestoreError> {
        let Some(nice) = self.session_nice else { return Ok(()) };
        let written = std::fs::write(format!("/proc/{tid}/autogroup"), nice.to_string());
        if let Err(error) = written {
            // Without autogroups there is nothing that the value would change.
            tracing::warn!(tid, %error, "the nice value {nice} of a session could not be set");
        }
        Ok(())
    }
}

/// Where the thread's new memory comes from, if that was chosen.
fn memory_nodes(asked: &Asked, outcome: &Outcome) -> Option<(u32, Vec<u64>)> {
    let (call, policy, nodes) = asked.memory_policy;
    outcome.result(call).ok()?;
    let policy = outcome.word(policy, 0) as u32;
    let nodes: Vec<u64> = (0..NODE_WORDS).map(|index| outcome.word(nodes, index)).collect();
    (policy != MPOL_DEFAULT).then_some((policy, nodes))
}

/// The nice value of the session that the thread's process leads; none where it is not, or 0 as everyone's.
fn session_nice(thread: &ThreadView) -> Option<i32> {
    let process = thread.process;
    if thread.tid != process.pid || process.status.ns_sid.last() != Some(&process.own_pid) {
        return None;
    }
    // `/autogroup-123 nice 5`
    let content = process.proc.read("autogroup").ok()?;
    let nice = std::str::from_utf8(&content).ok()?.split_whitespace().last()?.parse().ok()?;
    (nice != 0).then_some(nice)
}

impl Scheduling {
    /// The processors that there are here too; the kernel leaves out those that there are not.
    fn choose_processors(&self, program: &mut Program) {
        let wanted = self.processors.clone().unwrap_or_else(|| vec![u64::MAX; ALL]);
        let online = online("cpu");
        if !online.is_empty() && wanted.iter().zip(&online).all(|(wanted, online)| wanted & online == 0) {
            tracing::warn!("none of the processors that a thread was bound to is here: it may run on all");
            return;
        }
        let mask = program.words(&wanted);
        let arguments = [0.into(), (wanted.len() * 8).into(), mask.into()];
        program.call("bind to processors", libc::SYS_sched_setaffinity, arguments);
    }

    /// The clamps, once the policy is there: a kernel that has none refuses them, and loses nothing but a hint.
    fn clamp(&self, program: &mut Program) {
        const KEEP_POLICY_AND_PARAMETERS: u64 = 0x18;
        let Some((lower, upper)) = self.clamps else { return };
        let clamps = u64::from(lower) | u64::from(upper) << 32;
        let attributes = [CLAMPED_SIZE, CLAMP | KEEP_POLICY_AND_PARAMETERS, 0, 0, 0, 0, clamps];
        let attributes = program.words(&attributes);
        let arguments = [0.into(), attributes.into(), 0.into()];
        program.try_call("clamp its utilization", libc::SYS_sched_setattr, arguments);
    }

    /// Likewise the nodes of memory.
    fn choose_memory_nodes(&self, program: &mut Program) {
        let Some((policy, nodes)) = &self.memory_nodes else { return };
        let has_nodes = nodes.iter().any(|word| *word != 0);
        if has_nodes && !nodes.iter().zip(&online("node")).any(|(wanted, online)| wanted & online != 0) {
            tracing::warn!("none of the memory nodes that a thread was bound to is here: it may use all");
            return;
        }
        let mask = program.words(nodes);
        let bits = if has_nodes { nodes.len() * 64 } else { 0 };
        let arguments = [(*policy).into(), mask.into(), bits.into()];
        program.call("choose where memory comes from", libc::SYS_set_mempolicy, arguments);
    }
}

fn is_fair(policy: u32) -> bool {
    [libc::SCHED_OTHER, libc::SCHED_BATCH, libc::SCHED_IDLE].contains(&(policy as i32))
}

/// Whether the slice is the one that Limosa has itself.
fn is_default_slice(runtime: u64) -> bool {
    const SELF: i32 = 0;
    task::scheduling(SELF).is_ok_and(|own| own.runtime == runtime)
}

/// Whether `mask` has all bits of `all`.
fn covers(mask: &[u64], all: &[u64]) -> bool {
    !all.is_empty()
        && all.iter().enumerate().all(|(index, word)| word & !mask.get(index).copied().unwrap_or(0) == 0)
}

/// The processors (`cpu`) or memory nodes (`node`) that are there, 64 in each word; empty if nobody tells.
fn online(kind: &str) -> Vec<u64> {
    std::fs::read_to_string(format!("/sys/devices/system/{kind}/online"))
        .map_or_else(|_| Vec::new(), |text| parse_list(&text))
}

/// A list such as `0-3,8`.
fn parse_list(text: &str) -> Vec<u64> {
    let mut mask = Vec::new();
    for range in text.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (Ok(first), Ok(last)) = (first.parse::<usize>(), last.parse::<usize>()) else { continue };
        for number in first..=last.min(ALL * 64 - 1) {
            if mask.len() <= number / 64 {
                mask.resize(number / 64 + 1, 0);
            }
            mask[number / 64] |= 1 << (number % 64);
        }
    }
    mask
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn any_list_ends_in_a_mask_of_bounded_length(text in "[-,0-9 x]{0,60}") {
            proptest::prop_assert!(parse_list(&text).len() <= ALL);
        }
    }

    #[test]
    fn lists_of_processors_are_masks() {
        assert_eq!(parse_list("0-3,8\n"), [0b1_0000_1111]);
        assert_eq!(parse_list("0,64"), [1, 1]);
        assert_eq!(parse_list("7-0,x,-,18446744073709551615,0-18446744073709551615").len(), ALL);
        assert!(covers(&[0b111], &[0b101]) && !covers(&[0b101], &[0b111]) && !covers(&[1], &[1, 1]));
    }
}
