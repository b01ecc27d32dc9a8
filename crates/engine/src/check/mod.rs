//! What this kernel, these privileges and this CPU allow, feature by feature: for `limosa check`.
//!
//! Every answer comes from trying it (see `limosa_kernel::probe`); versions are not asked. Nothing is left behind:
//! what needs namespaces is tried on a thread of its own, and ends with it.

mod probes;

use serde::Serialize;

/// What a feature belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Area {
    /// Nothing works without.
    Essential,
    /// Memory: speed and live modes.
    Memory,
    /// Objects of single kinds.
    Objects,
    /// Connections.
    Network,
    /// Containers of `limosa run`.
    Containers,
    /// Capabilities.
    Privileges,
    /// The processor.
    Processor,
}

/// A feature that Limosa uses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Feature {
    /// Its name: a system call, option or capability as its manual page has it.
    pub name: &'static str,
    /// What it belongs to.
    pub area: Area,
    /// Whether it is there.
    pub available: bool,
    /// Why it is not: the kernel's answer.
    pub why: Option<String>,
    /// What is lost without it.
    pub lost: &'static str,
}

/// Tries everything.
pub fn features() -> Vec<Feature> {
    let mut features: Vec<Feature> = probes::PROBES
        .iter()
        .map(|probe| {
            let why = (probe.attempt)().err();
            Feature { name: probe.name, area: probe.area, available: why.is_none(), why, lost: probe.lost }
        })
        .collect();
    features.extend(probes::capabilities());
    features.extend(probes::processor());
    features
}

/// Whether checkpoint and restore work at all.
pub fn is_sufficient(features: &[Feature]) -> bool {
    features.iter().all(|feature| feature.available || feature.area != Area::Essential)
}
