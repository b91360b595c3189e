//! What metrics show of a shelf. Called under the pool's lock, so that a later reading is never older.

use super::state::{Shelf, State};
use crate::metrics::Metrics;
use crate::metrics::defs::{HullLabels, HullState};

impl State {
    /// A shelf's handler, as metrics name it.
    pub(super) fn label(&self, shelf: &Shelf) -> String {
        let default = self
            .current
            .as_ref()
            .map_or("default", |current| &current.facts.default_handler);
        match shelf.config.runtime_handler.as_str() {
            "" => default.to_owned(),
            name => name.to_owned(),
        }
    }

    /// Publishes how many hulls of a shelf can be taken.
    pub(super) fn show_ready(&self, metrics: &Metrics, shelf: usize) {
        if let Some(shelf) = self.shelves.get(shelf) {
            let labels = HullLabels {
                handler: self.label(shelf),
                state: HullState::ready,
            };
            let gauge = metrics.pool_hulls.get_or_create_owned(&labels);
            gauge.set(i64::try_from(shelf.idle.len()).unwrap_or(i64::MAX));
        }
    }
}
