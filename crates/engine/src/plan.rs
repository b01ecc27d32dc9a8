//! The plan by which a process tree is born again: who makes whom, and when in relation to setsid(2).
//!
//! A process gets its session and group from its maker, or makes its own. So a child that belongs to its parent's
//! former session must be made before the parent calls setsid. Where the leader of a session or group has ended,
//! a *ghost* stands in for it: a process with the leader's ID that makes the session or group, makes the members
//! that nobody else can make (as its siblings, by `CLONE_PARENT`), and ends before the tree runs.

use std::collections::{HashMap, HashSet};

use crate::error::RestoreError;
use crate::state::{Life, Tree};

/// Index of a node in a [`Plan`].
pub type NodeId = usize;

/// Who a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A process: index into [`Tree::processes`].
    Process(usize),
    /// A stand-in for an ended leader.
    Ghost,
}

/// What a node does as soon as it is born, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// setsid(2).
    OwnSession,
    /// setpgid(0, 0).
    OwnGroup,
    /// Makes a child.
    Child(NodeId),
    /// Makes a sibling.
    Sibling(NodeId),
}

/// A process to be made.
#[derive(Clone, Debug)]
pub struct Node {
    /// Its ID.
    pub pid: i32,
    /// Who it is.
    pub role: Role,
    /// The node that will be its parent; none for the root.
    pub parent: Option<NodeId>,
    /// What it does when born.
    pub steps: Vec<Step>,
}

/// What a plan needs to know of a process.
#[derive(Clone, Copy, Debug)]
pub struct Kin {
    /// Its ID.
    pub pid: i32,
    /// Its parent's ID.
    pub parent: i32,
    /// Its process group.
    pub process_group: i32,
    /// Its session.
    pub session: i32,
    /// Whether it has not ended.
    pub alive: bool,
}

impl Kin {
    /// The kin of a tree, in its order.
    pub fn of(tree: &Tree) -> Vec<Self> {
        let kin = |process: &crate::state::Process| Self {
            pid: process.pid,
            parent: process.parent,
            process_group: process.process_group,
            session: process.session,
            alive: matches!(process.life, Life::Alive(_)),
        };
        tree.processes.iter().map(kin).collect()
    }
}

/// How a tree is born.
#[derive(Clone, Debug)]
pub struct Plan {
    /// All nodes. The first ones are the tree's processes, in its order; ghosts follow.
    pub nodes: Vec<Node>,
}

impl Plan {
    /// The plan for a tree, whose processes come parents first.
    pub fn new(processes: &[Kin]) -> Result<Self, RestoreError> {
        Planner::check(processes)?.plan()
    }

    /// Nodes such that each comes after all nodes that it makes.
    pub fn makers_last(&self) -> Vec<NodeId> {
        let mut order = Vec::with_capacity(self.nodes.len());
        let mut stack = vec![(0, false)];
        while let Some((node, made)) = stack.pop() {
            if made {
                order.push(node);
                continue;
            }
            stack.push((node, true));
            for step in &self.nodes[node].steps {
                if let Step::Child(made) | Step::Sibling(made) = step {
                    stack.push((*made, false));
                }
            }
        }
        order
    }
}

struct Planner<'a> {
    processes: &'a [Kin],
    by_pid: HashMap<i32, usize>,
    children: Vec<Vec<usize>>,
    nodes: Vec<Node>,
    /// The session each process must be born in, where it matters.
    births: Vec<Option<i32>>,
    ghosts: HashMap<i32, NodeId>,
}

impl<'a> Planner<'a> {
    /// Checks that the processes are one tree in order, with distinct IDs.
    fn check(processes: &'a [Kin]) -> Result<Self, RestoreError> {
        let mut by_pid = HashMap::new();
        let mut children = vec![Vec::new(); processes.len()];
        for (index, process) in processes.iter().enumerate() {
            if process.pid <= 0 || by_pid.insert(process.pid, index).is_some() {
                return Err(RestoreError::inconsistent(format!(
                    "process ID {} appears twice or is none",
                    process.pid
                )));
            }
            if index > 0 {
                let Some(parent) = by_pid.get(&process.parent).copied().filter(|parent| *parent != index)
                else {
                    return Err(RestoreError::inconsistent(format!("process {} has no parent", process.pid)));
                };
                if !processes[parent].alive {
                    return Err(RestoreError::inconsistent(format!(
                        "process {} has a dead parent",
                        process.pid
                    )));
                }
                children[parent].push(index);
            }
        }
        if !processes.first().is_some_and(|root| root.alive) {
            return Err(RestoreError::inconsistent("the tree has no living root"));
        }
        let births = vec![None; processes.len()];
        Ok(Self { processes, by_pid, children, nodes: Vec::new(), births, ghosts: HashMap::new() })
    }

    fn plan(mut self) -> Result<Plan, RestoreError> {
        for (index, process) in self.processes.iter().enumerate() {
            let parent = (index > 0).then(|| self.by_pid[&process.parent]);
            self.nodes.push(Node { pid: process.pid, role: Role::Process(index), parent, steps: Vec::new() });
        }
        for index in (0..self.processes.len()).rev() {
            self.births[index] = self.required_birth(index);
        }
        for index in 0..self.processes.len() {
            self.order_children(index)?;
        }
        self.make_groups();
        Ok(Plan { nodes: self.nodes })
    }

    fn leads_session(&self, index: usize) -> bool {
        self.processes[index].session == self.processes[index].pid
    }

    /// The session a process must be born in: its own, or, if it makes its own, the one that its children keep
    /// from the time before.
    fn required_birth(&self, index: usize) -> Option<i32> {
        let process = &self.processes[index];
        if !self.leads_session(index) {
            return Some(process.session);
        }
        self.children[index]
            .iter()
            .filter_map(|child| self.births[*child])
            .find(|session| *session != process.session && self.by_pid.contains_key(session))
    }

    /// Puts the making of a process's children before or after its own setsid.
    fn order_children(&mut self, index: usize) -> Result<(), RestoreError> {
        let process = &self.processes[index];
        let mut steps = Vec::new();
        let mut late = Vec::new();
        for child in self.children[index].clone() {
            match self.births[child] {
                None => late.push(Step::Child(child)),
                Some(session) if session == process.session => late.push(Step::Child(child)),
                Some(session) if Some(session) == self.births[index] => steps.push(Step::Child(child)),
                // Its session's leader is its sibling: that one makes it.
                Some(session) => match self.by_pid.get(&session).copied() {
                    Some(leader) if self.nodes[leader].parent == Some(index) => {
                        self.nodes[leader].steps.push(Step::Sibling(child));
                    }
                    Some(_) => {
                        let what = format!("process {} of session {session}", self.processes[child].pid);
                        let why =
                            "its parent never was in that session and is not the leader's parent".into();
                        return Err(RestoreError::Unsupported { what, why });
                    }
                    None => {
                        let ghost = self.session_ghost(session, index, &mut late)?;
                        self.nodes[ghost].steps.push(Step::Sibling(child));
                    }
                },
            }
        }
        if self.leads_session(index) {
            steps.push(Step::OwnSession);
        } else if process.process_group == process.pid {
            steps.push(Step::OwnGroup);
        }
        steps.extend(late);
        // Siblings that an earlier process asked this one to make come last.
        let asked = std::mem::take(&mut self.nodes[index].steps);
        steps.extend(asked);
        self.nodes[index].steps = steps;
        Ok(())
    }

    /// The stand-in for the ended leader of `session`, made by `parent` as its child.
    fn session_ghost(
        &mut self,
        session: i32,
        parent: usize,
        steps: &mut Vec<Step>,
    ) -> Result<NodeId, RestoreError> {
        if let Some(ghost) = self.ghosts.get(&session) {
            if self.nodes[*ghost].parent != Some(parent) {
                let what = format!("session {session}");
                let why = "its leader has ended and its members have different parents".into();
                return Err(RestoreError::Unsupported { what, why });
            }
            return Ok(*ghost);
        }
        let ghost = self.add_ghost(session, parent, Step::OwnSession);
        steps.push(Step::Child(ghost));
        Ok(ghost)
    }

    fn add_ghost(&mut self, pid: i32, parent: NodeId, step: Step) -> NodeId {
        let ghost = self.nodes.len();
        self.nodes.push(Node { pid, role: Role::Ghost, parent: Some(parent), steps: vec![step] });
        self.ghosts.insert(pid, ghost);
        ghost
    }

    /// Stand-ins for groups whose leader has ended: each made by a member, in whose session it then is.
    fn make_groups(&mut self) {
        let root_group = self.processes[0].process_group;
        let mut known: HashSet<i32> = HashSet::new();
        for (index, process) in self.processes.iter().enumerate() {
            let group = process.process_group;
            let outside = group == root_group && !self.by_pid.contains_key(&group);
            let exists = self.by_pid.contains_key(&group) || self.ghosts.contains_key(&group);
            if group != 0 && !outside && !exists && process.alive && known.insert(group) {
                let ghost = self.add_ghost(group, index, Step::OwnGroup);
                self.nodes[index].steps.push(Step::Child(ghost));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Living processes from (pid, parent, group, session).
    fn plan(processes: &[(i32, i32, i32, i32)]) -> Result<Plan, RestoreError> {
        let kin = |(pid, parent, process_group, session): &(i32, i32, i32, i32)| Kin {
            pid: *pid,
            parent: *parent,
            process_group: *process_group,
            session: *session,
            alive: true,
        };
        Plan::new(&processes.iter().map(kin).collect::<Vec<_>>())
    }

    #[test]
    fn children_of_the_former_session_come_before_setsid() {
        // 10 leads its session; 11 became a leader after it had made 12, which stayed in session 10.
        let plan = plan(&[(10, 1, 10, 10), (11, 10, 11, 11), (12, 11, 10, 10), (13, 11, 11, 11)]).unwrap();
        assert_eq!(plan.nodes[1].steps, [Step::Child(2), Step::OwnSession, Step::Child(3)]);
        assert_eq!(plan.makers_last().last(), Some(&0));
    }

    #[test]
    fn a_ghost_stands_in_for_a_daemons_dead_session_leader() {
        // A container's init 1 inherited 7, whose session leader 5 has ended.
        let plan = plan(&[(1, 0, 1, 1), (7, 1, 5, 5)]).unwrap();
        let ghost = plan.nodes.iter().position(|node| node.role == Role::Ghost).unwrap();
        assert_eq!(plan.nodes[ghost].pid, 5);
        assert_eq!(plan.nodes[ghost].steps, [Step::OwnSession, Step::Sibling(1)]);
        assert_eq!(plan.nodes[0].steps, [Step::OwnSession, Step::Child(ghost)]);
    }

    #[test]
    fn a_ghost_stands_in_for_the_first_of_a_pipeline() {
        let plan = plan(&[(1, 0, 1, 1), (7, 1, 6, 1), (8, 1, 6, 1)]).unwrap();
        let ghost = plan.nodes.iter().position(|node| node.role == Role::Ghost).unwrap();
        assert_eq!((plan.nodes[ghost].pid, plan.nodes[ghost].parent), (6, Some(1)));
        assert_eq!(plan.nodes.len(), 4, "one ghost serves both members");
    }

    #[test]
    fn hostile_trees_are_refused() {
        assert!(plan(&[]).is_err());
        assert!(plan(&[(1, 0, 1, 1), (1, 1, 1, 1)]).is_err());
        assert!(plan(&[(1, 0, 1, 1), (2, 3, 1, 1), (3, 2, 1, 1)]).is_err());
        assert!(plan(&[(-1, 0, 1, 1)]).is_err());
    }
}
