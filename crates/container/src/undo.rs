//! Undoing what was done so far when a later step fails.

/// Steps that take back what was done, run in reverse order on drop unless released.
#[derive(Default)]
pub(crate) struct Undo {
    steps: Vec<Box<dyn FnOnce() + Send>>,
}

impl Undo {
    /// Adds a step. It must deal with its own failures: nobody is left to report them to.
    pub(crate) fn add(&mut self, step: impl FnOnce() + Send + 'static) {
        self.steps.push(Box::new(step));
    }

    /// What was done stays.
    pub(crate) fn release(&mut self) {
        self.steps.clear();
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        while let Some(step) = self.steps.pop() {
            step();
        }
    }
}

impl std::fmt::Debug for Undo {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Undo({} steps)", self.steps.len())
    }
}
