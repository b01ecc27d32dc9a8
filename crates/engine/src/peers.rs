//! Peers of unix sockets that have ended, in a tree with a PID namespace of its own.
//!
//! `SO_PEERCRED` gives the peer's ID as the caller sees it. Of a peer in the tree Limosa knows its ID there; of one that has
//! ended (a parent that made the socket and daemonized, say) only a process inside can tell: so one of those that hold
//! the socket is asked. Of a socket that is only in flight it stays unknown.

use std::collections::HashMap;

use limosa_kernel::net::peer;
use limosa_puppet::{Data, Program};

use crate::error::CaptureError;
use crate::network;
use crate::view::DescriptionView;
use crate::visits::run_inside;

/// The ID in the tree of the peers that Limosa does not know, by the inode number of the socket. The tree is frozen.
pub(crate) fn ask(
    found: &[DescriptionView],
    own_pids: &HashMap<i32, i32>,
) -> Result<HashMap<u64, i32>, CaptureError> {
    let mut questions: HashMap<i32, Vec<&DescriptionView>> = HashMap::new();
    let held = found.iter().filter(|view| view.number().is_some());
    for view in held.filter(|view| view.process.pid != view.process.own_pid) {
        if network::kind(view).is_some_and(|kind| kind.domain == libc::AF_UNIX)
            && peer::peer(&view.descriptor)?.is_some_and(|peer| !own_pids.contains_key(&peer.pid))
        {
            questions.entry(view.process.pid).or_default().push(view);
        }
    }
    let mut answers = HashMap::new();
    for views in questions.into_values() {
        ask_one(&views, &mut answers)?;
    }
    Ok(answers)
}

/// Asks one process, which holds all of `views`.
fn ask_one(views: &[&DescriptionView], answers: &mut HashMap<u64, i32>) -> Result<(), CaptureError> {
    let Some(process) = views.first().map(|view| view.process) else { return Ok(()) };
    let mut program = Program::new();
    let asked: Vec<Data> =
        views.iter().filter_map(|view| Some(question(view.number()?, &mut program))).collect();
    let outcome = run_inside(process, program)?;
    outcome.check().map_err(|source| CaptureError::Question { pid: process.pid, source })?;
    for (view, data) in views.iter().zip(asked) {
        if let Some((peer, ..)) = peer::parse_credentials(outcome.bytes(data)) {
            answers.insert(view.stat.st_ino, peer);
        }
    }
    Ok(())
}

/// Adds getsockopt(SO_PEERCRED); gives where the answer will be.
fn question(number: i32, program: &mut Program) -> Data {
    let (credentials, length) = (program.space(12), program.words(&[12]));
    let arguments =
        [number.into(), libc::SOL_SOCKET.into(), libc::SO_PEERCRED.into(), credentials.into(), length.into()];
    program.call("ask for a socket's peer", libc::SYS_getsockopt, arguments);
    credentials
}
