//! Visits of whole processes: their leaders run programs, frozen or on their way.

use limosa_kernel::memory::ForeignMemory;
use limosa_kernel::proc::{MappingName, ProcDir};
use limosa_kernel::ptrace;
use limosa_puppet::{Outcome, Program, Vdso, Visit, step_out_of_stub};

use crate::error::{CaptureError, Refusal};
use crate::freeze::{seize, settle};
use crate::resources::registers;
use crate::view::ProcessView;

/// Where the vDSO of a process is, which a visit needs.
pub(crate) fn locate_vdso(view: &ProcessView, memory: &ForeignMemory) -> Result<Vdso, CaptureError> {
    let mapping =
        view.mappings.iter().find(|mapping| mapping.name == MappingName::Vdso).ok_or_else(|| {
            Refusal::process(view.pid, "it has no vDSO", "run it on a kernel with vdso enabled (no vdso=0)")
        })?;
    Ok(Vdso::locate(view.pid, memory, mapping.start, mapping.end)?)
}

/// Has the leader of a frozen process run a program of its own, which must be harmless also when nobody waits for it.
pub(crate) fn run_inside(view: &ProcessView, program: Program) -> Result<Outcome, CaptureError> {
    run(view, program, None)
}

/// The same; `look` is given the first argument of each system call `number` just before the process makes it.
pub(crate) fn run_inside_pausing(
    view: &ProcessView,
    program: Program,
    number: i64,
    look: &mut dyn FnMut(u64),
) -> Result<Outcome, CaptureError> {
    run(view, program, Some((number, look)))
}

fn run(
    view: &ProcessView,
    program: Program,
    pause: Option<(i64, &mut dyn FnMut(u64))>,
) -> Result<Outcome, CaptureError> {
    let foreign = ForeignMemory::open(view.pid)?;
    let vdso = locate_vdso(view, &foreign)?;
    let mut visit =
        Visit::begin(view.pid, view.pid, vdso, &foreign, view.status.signals.caught, program.size())?;
    let outcome = match pause {
        Some((number, look)) => visit.run_pausing(program, number, look)?,
        None => visit.run(program)?,
    };
    visit.end()?;
    Ok(outcome)
}

/// Stops the first thread of a running process for the moment that `work` takes; it is in no stub of a killed checkpoint then,
/// nor afterwards. None if that thread has ended.
pub(crate) fn visit_running<T>(
    pid: i32,
    work: impl FnOnce(&ProcessView) -> Result<T, CaptureError>,
) -> Result<Option<T>, CaptureError> {
    match seize(pid) {
        Err(error) if error.is_gone() => return Ok(None),
        seized => seized?,
    }
    let done = (|| {
        ptrace::interrupt(pid)?;
        if settle(pid)?.is_none() {
            return Ok(None);
        }
        visit_stopped(pid, work).map(Some)
    })();
    if let Err(error) = ptrace::detach(pid, 0) {
        tracing::debug!(pid, %error, "detach");
    }
    done
}

/// The same of a process whose first thread is stopped already.
pub(crate) fn visit_stopped<T>(
    pid: i32,
    work: impl FnOnce(&ProcessView) -> Result<T, CaptureError>,
) -> Result<T, CaptureError> {
    let (proc, foreign) = (ProcDir::open(pid)?, ForeignMemory::open(pid)?);
    let view = ProcessView::glance(pid, &proc)?;
    step_out_of_stub(pid, &locate_vdso(&view, &foreign)?)?;
    registers::hide_interruption(pid)?;
    work(&view)
}
