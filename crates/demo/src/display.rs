//! What is shown while the demo runs, on standard error: a live line on a terminal, plain lines elsewhere.

use std::cell::RefCell;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::counter::Live;
use crate::figures::ms;

/// Where there is no terminal, how often the client is reported.
const INTERVAL: Duration = Duration::from_secs(2);

/// The display.
pub struct Display {
    begun: Instant,
    bar: Option<ProgressBar>,
    state: RefCell<State>,
}

/// What was shown last.
struct State {
    activity: String,
    shown: Instant,
    /// Increments at some moment, to find the rate.
    mark: (Instant, u64),
    rate: f64,
}

impl Display {
    /// On standard error.
    pub fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        let now = Instant::now();
        let state = State { activity: String::new(), shown: now, mark: (now, 0), rate: 0.0 };
        Self { begun: now, bar, state: RefCell::new(state) }
    }

    /// A line that stays: what is done now.
    pub fn step(&self, text: &str) {
        self.note(text);
        self.state.borrow_mut().activity.clear();
    }

    /// A line that stays.
    pub fn note(&self, text: &str) {
        let line = format!("{:6.1} s  {text}", self.begun.elapsed().as_secs_f64());
        match &self.bar {
            Some(bar) => bar.println(line),
            // Standard error may be closed; the demo goes on.
            None => drop(writeln!(std::io::stderr(), "{line}")),
        }
    }

    /// What goes on: `activity` is its kind, shown where there is no terminal when it changes; `detail` changes all
    /// the time.
    pub fn live(&self, activity: &str, detail: &str, client: Option<Live>) {
        let client = client.map(|live| self.client(live)).unwrap_or_default();
        if let Some(bar) = &self.bar {
            bar.set_message(format!("{activity}{detail}\n  {client}"));
            return;
        }
        let changed = self.state.borrow().activity != activity;
        let due = self.state.borrow().shown.elapsed() > INTERVAL;
        if changed || due {
            self.note(&format!("    {activity}{detail}  {client}"));
            let mut state = self.state.borrow_mut();
            activity.clone_into(&mut state.activity);
            state.shown = Instant::now();
        }
    }

    fn client(&self, live: Live) -> String {
        let mut state = self.state.borrow_mut();
        let (since, increments) = state.mark;
        let passed = since.elapsed();
        if passed > Duration::from_millis(200) {
            state.rate = live.increments.saturating_sub(increments) as f64 / passed.as_secs_f64();
            state.mark = (Instant::now(), live.increments);
        }
        let silent = if live.silent > Duration::from_millis(50) {
            format!("waiting for a reply for {:.0} ms, ", ms(live.silent))
        } else {
            String::new()
        };
        let rate = state.rate;
        format!("client: {rate:.0}/s, {silent}longest gap {:.1} ms", ms(live.longest_gap))
    }

    /// Nothing live is left on the terminal.
    pub fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
