//! `limosa completions` and `limosa man`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::context::{Context, Outcome};

/// Print completions for a shell.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    limosa completions bash > /usr/share/bash-completion/completions/limosa\n  \
    limosa completions fish > ~/.config/fish/completions/limosa.fish")]
pub struct Completions {
    /// The shell.
    shell: Shell,
}

impl Completions {
    /// Prints them.
    pub fn execute(self) -> Outcome {
        clap_complete::generate(
            self.shell,
            &mut crate::Cli::command(),
            "limosa",
            &mut std::io::stdout().lock(),
        );
        Ok(ExitCode::SUCCESS)
    }
}

/// Write the manual pages, one for each subcommand.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  limosa man --out /usr/local/share/man/man1")]
pub struct Man {
    /// The directory to write them to; it is made if it does not exist.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

impl Man {
    /// Writes them.
    pub fn execute(self, context: &Context) -> Outcome {
        let writing = || format!("writing manual pages to {}", self.out.display());
        std::fs::create_dir_all(&self.out).with_context(writing)?;
        clap_mangen::generate_to(crate::Cli::command(), &self.out).with_context(writing)?;
        context.report(&self.out, format_args!("{}\n", self.out.display()))?;
        Ok(ExitCode::SUCCESS)
    }
}
