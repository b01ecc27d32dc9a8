//! Session keyrings (keyrings(7), `session-keyring(7)`).
//!
//! Keys are not carried: they are secrets, and most are of use on their own machine only. But a login, a service or
//! `keyctl session` gives its processes a session keyring in which there is nothing but its user's keyring, and that one is made
//! again, with its name, owner and permissions. One with anything else in it is refused, as are keys in the keyrings of threads
//! and processes, which only these have. What users have (`user-keyring(7)`) is not the processes'.
//!
//! # How it is found out
//! To ask for the session keyring gives a thread one that has none, and children another user's. But request_key(2) looks through
//! all keyrings that a thread has, and finds keyrings by their names. Names are in `/proc/keys`, as its users may see it: one with a
//! name that has been given to another user is not found.
//!
//! # How it comes back
//! Children inherit it. So a process whose session keyring is not its maker's joins a new one as the first thing that it
//! does, and its user's keyring is linked there when it is that user's process. One that had none, but would inherit that of
//! whoever restores, gets one in which its user's default keyring is: there it would have searched.
//! Processes that shared one, but whose makers do not, have one each.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};

use limosa_kernel::keyring::{self, Keyring};
use limosa_kernel::proc::{ProcDir, Status};
use limosa_puppet::{CallId, Data, Outcome, Program};
use serde::{Deserialize, Serialize};

use crate::error::{CaptureError, Refusal, RestoreError};
use crate::plan::{Plan, Role, Step};
use crate::state::{Life, Thread, Tree};
use crate::view::ThreadView;

const JOIN_SESSION_KEYRING: i32 = 1;
const CHOWN: i32 = 4;
const SETPERM: i32 = 5;
const LINK: i32 = 8;
const DESCRIBE: i32 = 6;
const READ: i32 = 11;
const THREAD: i32 = -1;
const PROCESS: i32 = -2;
const SESSION: i32 = -3;
const USER: i32 = -4;
const USER_SESSION: i32 = -5;

/// The name of a session keyring without a name.
const ANONYMOUS: &[u8] = b"_ses";
/// Names that are asked for, at most. Nobody has so many keyrings.
const NAMES_MAX: usize = 64;
/// Links that are read of a keyring, of four bytes each.
const LINKS_MAX: usize = 64;
/// Bytes of a description that are read: those of a name are at most 4096.
const TEXT_MAX: usize = 256;
/// Longest name of a key, with its end.
const NAME_MAX: usize = 4096;

/// A session keyring.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionKeyring {
    /// Its name; none for `_ses`.
    #[serde(default)]
    pub name: Option<serde_bytes::ByteBuf>,
    /// Owner and group.
    pub owner: (u32, u32),
    /// `KEY_*_*`
    pub permissions: u32,
    /// Whether its user's keyring is linked in it.
    pub links_user: bool,
    /// Whether its user's default session keyring is.
    pub links_user_session: bool,
}

/// What was found of the session keyrings of a tree.
#[derive(Debug, Default)]
pub(crate) struct Found {
    keyrings: Vec<SessionKeyring>,
    by_id: HashMap<i32, usize>,
    /// What each user may see.
    visible: HashMap<u32, Vec<Keyring>>,
}

/// Where a thread's answers will be.
pub(crate) struct Asked {
    own: [(CallId, &'static str); 2],
    named: Vec<Named>,
}

/// Where the answers about one name will be.
struct Named {
    id: CallId,
    read: CallId,
    links: Data,
    described: CallId,
    text: Data,
}

/// Those whose keyrings a thread may be in.
fn users(status: &Status) -> [u32; 5] {
    let ids = status.uid;
    [0, ids.real, ids.effective, ids.saved, ids.fs]
}

/// A keyring that a thread has.
struct Answered {
    id: i32,
    /// How many keys are linked in it.
    count: usize,
    links: Vec<i32>,
    keyring: Keyring,
}

impl Named {
    fn ask(name: &[u8], program: &mut Program) -> Self {
        let (kind, name) = (program.string(b"keyring"), program.string(name));
        let (links, text) = (program.space(LINKS_MAX * 4), program.space(TEXT_MAX));
        let arguments = [kind.into(), name.into(), 0.into(), 0.into()];
        let id = program.try_call("look for a keyring", libc::SYS_request_key, arguments);
        let arguments = [READ.into(), id.into(), links.into(), (LINKS_MAX * 4).into()];
        let read = program.try_call("see what is in it", libc::SYS_keyctl, arguments);
        let arguments = [DESCRIBE.into(), id.into(), text.into(), TEXT_MAX.into()];
        let described = program.try_call("see whose it is", libc::SYS_keyctl, arguments);
        Self { id, read, links, described, text }
    }

    /// None where the thread has no keyring of that name, or may not look at it.
    fn answer(&self, outcome: &Outcome) -> Option<Answered> {
        let id = outcome.result(self.id).ok()? as i32;
        let count = outcome.result(self.read).ok()? as usize / 4;
        let words = outcome.bytes(self.links).chunks_exact(4);
        let words = words.map(|word| i32::from_ne_bytes(word.try_into().unwrap_or_default()));
        // With its end.
        let length = (outcome.result(self.described).ok()? as usize).checked_sub(1)?;
        let keyring = Keyring::described(id, outcome.bytes(self.text).get(..length)?)?;
        Some(Answered { id, count, links: words.take(count).collect(), keyring })
    }
}

impl Found {
    /// For the tree rooted at `root`, which runs: what the root's users may see is read now, so that the freeze is not longer
    /// for it. A session keyring that gets a name in the moment before the freeze is not found.
    pub(crate) fn new(root: i32) -> Result<Self, CaptureError> {
        let mut found = Self::default();
        for user in users(&ProcDir::open(root)?.status()?) {
            if let Entry::Vacant(place) = found.visible.entry(user) {
                place.insert(keyring::visible_to(user)?);
            }
        }
        Ok(found)
    }

    /// Adds the questions to a thread.
    pub(crate) fn ask(&mut self, thread: &ThreadView, program: &mut Program) -> Result<Asked, CaptureError> {
        let own = [(THREAD, "thread"), (PROCESS, "process")].map(|(keyring, whose)| {
            let arguments = [READ.into(), keyring.into(), 0.into(), 0.into()];
            (program.try_call("look for keys of its own", libc::SYS_keyctl, arguments), whose)
        });
        // Of another user's, a session keyring without a name can still be found.
        let mut names = BTreeSet::from([ANONYMOUS.to_vec()]);
        for user in users(&thread.status) {
            let visible = match self.visible.entry(user) {
                Entry::Occupied(visible) => visible.into_mut(),
                Entry::Vacant(place) => place.insert(keyring::visible_to(user)?),
            };
            names.extend(visible.iter().map(|keyring| keyring.description.clone()));
        }
        let named = names.iter().take(NAMES_MAX).map(|name| Named::ask(name, program));
        Ok(Asked { own, named: named.collect() })
    }

    /// The thread's session keyring, as an index into [`Self::finish`].
    pub(crate) fn answer(
        &mut self,
        thread: &ThreadView,
        asked: &Asked,
        outcome: &Outcome,
    ) -> Result<Option<usize>, CaptureError> {
        let refuse = |reason: String, remedy: &str| Refusal::process(thread.process.pid, reason, remedy);
        for (call, whose) in asked.own {
            if outcome.result(call).is_ok_and(|bytes| bytes > 0) {
                let reason = format!("there are keys in the keyring of its {whose} {}", thread.tid);
                return Err(
                    refuse(reason, "remove them (keyctl clear) and try again; keys are not carried").into()
                );
            }
        }
        let answered: Vec<Answered> = asked.named.iter().filter_map(|named| named.answer(outcome)).collect();
        let known = |id: i32| answered.iter().find(|other| other.id == id);
        let is_inside = |id: i32| answered.iter().any(|other| other.links.contains(&id));
        let mut found = answered.iter().filter(|it| !it.keyring.is_users() && !is_inside(it.id));
        let Some(Answered { id, count, links, keyring }) = found.next() else { return Ok(None) };
        if found.next().is_some() {
            let reason = format!("its thread {} has several keyrings", thread.tid);
            return Err(refuse(reason, "run it in a new session (keyctl session)").into());
        }
        if let Some(index) = self.by_id.get(id) {
            return Ok(Some(*index));
        }
        let links: Vec<&Keyring> =
            links.iter().filter_map(|id| Some(&known(*id)?.keyring)).filter(|it| it.is_users()).collect();
        let expires = self.visible.values().flatten().any(|listed| listed.id == *id && listed.expires);
        if *count > links.len() || expires {
            let what = if expires { "will expire" } else { "has keys in it, which are not carried" };
            let remedy =
                "remove its keys (keyctl clear @s), or run the program in a new session (keyctl session)";
            let name = String::from_utf8_lossy(&keyring.description);
            return Err(refuse(format!("its session keyring, {name}, {what}"), remedy).into());
        }
        let anonymous = keyring.description == ANONYMOUS;
        self.by_id.insert(*id, self.keyrings.len());
        self.keyrings.push(SessionKeyring {
            name: (!anonymous).then(|| keyring.description.clone().into()),
            owner: (keyring.uid, keyring.gid),
            permissions: keyring.permissions,
            links_user: links.iter().any(|link| !link.is_user_session()),
            links_user_session: links.iter().any(|link| link.is_user_session()),
        });
        Ok(Some(self.keyrings.len() - 1))
    }

    /// All that were found.
    pub(crate) fn finish(self) -> Vec<SessionKeyring> {
        self.keyrings
    }
}

/// Refuses threads with another session keyring than their process's first.
pub(crate) fn refuse_own(pid: i32, threads: &[Thread]) -> Result<(), CaptureError> {
    let leader = threads.first().and_then(|leader| leader.session_keyring);
    let Some(other) = threads.iter().find(|thread| thread.session_keyring != leader) else { return Ok(()) };
    let reason = format!("its thread {} has another session keyring than the first", other.tid);
    Err(Refusal::process(pid, reason, "run the whole program in a new session (keyctl session)").into())
}

/// Checks what a checkpoint says of keyrings.
pub(crate) fn check(tree: &Tree) -> Result<(), RestoreError> {
    let valid = |name: &[u8]| !name.is_empty() && name.len() < NAME_MAX && !name.contains(&0);
    if tree.session_keyrings.iter().any(|keyring| keyring.name.as_ref().is_some_and(|name| !valid(name))) {
        return Err(RestoreError::inconsistent("a session keyring with an impossible name"));
    }
    let mut threads = tree.living().flat_map(|(_, body)| &body.threads);
    if threads.any(|thread| thread.session_keyring.is_some_and(|at| at >= tree.session_keyrings.len())) {
        return Err(RestoreError::inconsistent("a session keyring that there is none of"));
    }
    Ok(())
}

/// Which nodes of a plan join a session keyring. `inherits` says that the root would inherit one.
pub(crate) fn joining(tree: &Tree, plan: &Plan, inherits: bool) -> Vec<bool> {
    let mut joins = vec![false; plan.nodes.len()];
    let mut unvisited = vec![(0, if inherits { Has::Strangers } else { Has::Nothing })];
    while let Some((node, inherited)) = unvisited.pop() {
        let wanted = match plan.nodes[node].role {
            Role::Process(index) => wanted(tree, index),
            Role::Ghost => None,
        };
        let has = match (wanted, inherited) {
            (Some(Wanted { keyring: Some(keyring), .. }), _) => Has::Keyring(keyring),
            (Some(_), Has::Nothing) | (None, _) => inherited,
            (Some(Wanted { keyring: None, user }), _) => Has::UsersOf(user),
        };
        joins[node] = has != inherited;
        let made = plan.nodes[node].steps.iter().filter_map(|step| match step {
            Step::Child(made) | Step::Sibling(made) => Some(*made),
            Step::OwnSession | Step::OwnGroup => None,
        });
        unvisited.extend(made.map(|made| (made, has)));
    }
    joins
}

/// What a process is in while it is born.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Has {
    /// In the session keyring of whoever restores.
    Strangers,
    /// In none.
    Nothing,
    /// In one that stands for none, with what a user has by default.
    UsersOf(u32),
    /// In one of the tree's.
    Keyring(usize),
}

/// What it is to be in.
struct Wanted {
    keyring: Option<usize>,
    user: u32,
}

/// The session keyring of a living process, if any.
fn wanted(tree: &Tree, index: usize) -> Option<Wanted> {
    let Life::Alive(body) = &tree.processes[index].life else { return None };
    let leader = body.threads.first()?;
    Some(Wanted { keyring: leader.session_keyring, user: leader.state.credentials.users[0] })
}

fn of_process(tree: &Tree, index: usize) -> Option<&SessionKeyring> {
    tree.session_keyrings.get(wanted(tree, index)?.keyring?)
}

/// Adds the calls by which a process joins its session keyring; it has all privileges yet.
pub(crate) fn join(tree: &Tree, index: usize, program: &mut Program) {
    let keyring = of_process(tree, index);
    let name = match keyring.and_then(|keyring| keyring.name.as_ref()) {
        Some(name) => program.string(name).into(),
        None => 0.into(),
    };
    let arguments = [JOIN_SESSION_KEYRING.into(), name];
    let Some(keyring) = keyring else {
        program.try_call("leave the session keyring", libc::SYS_keyctl, arguments);
        return;
    };
    program.call("join a session keyring", libc::SYS_keyctl, arguments);
    let (uid, gid) = keyring.owner;
    let arguments = [CHOWN.into(), SESSION.into(), uid.into(), gid.into()];
    program.try_call("give it its owner", libc::SYS_keyctl, arguments);
}

/// Adds the calls that link the user's keyrings in the session keyring that the process has joined; it is the user's now.
pub(crate) fn link(tree: &Tree, index: usize, program: &mut Program) {
    let mut link = |keyring: i32| {
        let arguments = [LINK.into(), keyring.into(), SESSION.into()];
        // The user may have no right to: then there is nothing in it for the process to find.
        program.try_call("link a user's keyring", libc::SYS_keyctl, arguments);
    };
    let Some(keyring) = of_process(tree, index) else { return link(USER_SESSION) };
    if keyring.links_user {
        link(USER);
    }
    if keyring.links_user_session {
        link(USER_SESSION);
    }
    let arguments = [SETPERM.into(), SESSION.into(), keyring.permissions.into()];
    program.try_call("set the session keyring's permissions", libc::SYS_keyctl, arguments);
}
