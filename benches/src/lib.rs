//! Measurements: the cold-start experiment of `make demo`, and the figures of `make figures`.
//!
//! The cold-start experiment: the same function started from the ordinary image on overlayfs and from the converted one
//! on Hullspeed, as a kubelet would, over the same shaped link, with nothing of the image on the node.
//!
//! [`demo`] sets the stage and alternates the modes, [`coldstart`] runs and measures one start, [`report`] condenses the
//! rounds. The binary `startup` (`make demo`) is a thin shell around them.
//!
//! [`figure`] is what a figure looks like; [`hulls`] measures those of pod hulls, [`fetch`] those of the fetch engine and the
//! layer cache, [`native`] those of the ways to mount layers. The binary `figures` prints them; `workload` is what it has done to a tree.

pub mod coldstart;
pub mod demo;
pub mod fetch;
pub mod figure;
pub mod hulls;
pub mod native;
pub mod report;
