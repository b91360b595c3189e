//! TOCs that are kept apart from their layers, in an image of their own.
//!
//! Its name is the image's with `-esgztoc` behind the tag; each of its layers is a TOC member and names the layer it belongs to
//! in an annotation. The tag may move and nothing about that image is believed: the TOC's digest is compared with the one in the
//! layer's own manifest.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use estargz::digest::Digest;
use estargz::toc::{MAX_TOC_MEMBER_BYTES, TOC_IMAGE_SUFFIX};
use hullspeed_registry::{Reference, ReferenceError};

use crate::layer::image::LayerDescriptor;
use crate::layer::source::{BlobSource, SourceError};

/// How long the layers of a TOC image are remembered: the layers of one image are opened at once.
const KEPT_FOR: Duration = Duration::from_secs(60);
/// TOC images remembered.
const MAX_IMAGES: u64 = 256;

/// Finds the TOCs that are not in their layers.
#[async_trait]
pub(in crate::layer) trait TocImages: Send + Sync {
    /// The sources of the blob that holds the TOC of `layer`, of known size.
    async fn find(&self, image: &str, layer: &Digest) -> Result<Vec<Arc<dyn BlobSource>>, SourceError>;
}

/// TOC images by their names.
pub(in crate::layer) type KnownTocImages = moka::future::Cache<String, Arc<[LayerDescriptor]>>;

/// A memory of TOC images.
pub(in crate::layer) fn known_toc_images() -> KnownTocImages {
    moka::future::Cache::builder()
        .max_capacity(MAX_IMAGES)
        .time_to_live(KEPT_FOR)
        .build()
}

/// The TOC image of `image`. An image that is named by its digest alone has none.
pub(in crate::layer) fn toc_image(image: &Reference) -> Result<Reference, SourceError> {
    let Some(tag) = image.tag().or(image.digest().is_none().then_some("latest")) else {
        return Err(permanent(format!(
            "{image} has no tag by which its TOC image could be found"
        )));
    };
    let name = format!("{}/{}:{tag}{TOC_IMAGE_SUFFIX}", image.host(), image.repository());
    Reference::parse(&name).map_err(|error: ReferenceError| permanent(error.to_string()))
}

/// The TOC of `layer` among the layers of its TOC image.
pub(in crate::layer) fn toc_of<'a>(
    layers: &'a [LayerDescriptor],
    layer: &Digest,
    image: &Reference,
) -> Result<&'a LayerDescriptor, SourceError> {
    let toc = layers.iter().find(|toc| toc.toc_of.as_ref() == Some(layer));
    let toc = toc.ok_or_else(|| permanent(format!("{image} has no TOC of the layer")))?;
    if toc.size > MAX_TOC_MEMBER_BYTES {
        let size = toc.size;
        return Err(permanent(format!(
            "the TOC in {image} has {size} bytes, more than {MAX_TOC_MEMBER_BYTES}"
        )));
    }
    Ok(toc)
}

fn permanent(what: String) -> SourceError {
    SourceError::Permanent {
        what,
        class: "not_found",
        cause: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_toc_image_has_the_tag_of_the_image_and_a_suffix() {
        let name = |image: &str| toc_image(&Reference::parse(image).unwrap()).map(|image| image.to_string());
        let digest = Digest::of("x");
        assert_eq!(name("reg.test:5000/a/b:1.2").unwrap(), "reg.test:5000/a/b:1.2-esgztoc");
        assert_eq!(name(&format!("reg.test/b:1@{digest}")).unwrap(), "reg.test/b:1-esgztoc");
        assert_eq!(name("reg.test/b").unwrap(), "reg.test/b:latest-esgztoc");
        assert!(
            name(&format!("reg.test/b@{digest}"))
                .unwrap_err()
                .to_string()
                .contains("has no tag")
        );
        assert!(name(&format!("reg.test/b:{}", "t".repeat(125))).is_err());
    }

    #[test]
    fn a_toc_is_found_by_the_layer_it_names_and_has_a_limit() {
        let image = Reference::parse("reg.test/b:1-esgztoc").unwrap();
        let descriptor = |size, toc_of| LayerDescriptor {
            digest: Digest::of("toc"),
            size,
            toc_digest: None,
            position: None,
            toc_offset: None,
            toc_of,
        };
        let (one, two, none) = (Digest::of("1"), Digest::of("2"), Digest::of("3"));
        let layers = [
            descriptor(5, None),
            descriptor(6, Some(one)),
            descriptor(MAX_TOC_MEMBER_BYTES + 1, Some(two)),
        ];
        assert_eq!(toc_of(&layers, &one, &image).unwrap().size, 6);
        for (layer, message) in [(two, "more than"), (none, "has no TOC of the layer")] {
            let error = toc_of(&layers, &layer, &image).unwrap_err();
            assert!(error.to_string().contains(message) && !error.is_transient(), "{error}");
        }
    }
}
