//! What the engine tells of layers and hosts, for people.

use super::engine::Engine;
use super::layer::{LayerFetch, LayerNames};
use crate::layer::report::{Cost, HostReport};

impl Engine {
    /// The hosts that were asked, by name.
    pub fn hosts(&self) -> Vec<HostReport> {
        Vec::new()
    }

    /// Requests under way, by what they are for.
    pub fn in_flight(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

impl LayerFetch {
    /// The image and the blob that are asked for first.
    pub fn names(&self) -> LayerNames {
        self.remotes().all()[0].names.clone()
    }

    /// What the layer has cost since it was opened.
    pub fn cost(&self) -> Cost {
        Cost::default()
    }
}
