"""What a DICOM header says besides the pixels: whose image it is, what is burned into it, how large a pixel is."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pydicom import Dataset

# Attributes that tell who the patient is, or narrow it down (PS3.15, table E.1-1), of an image as a whole.
_IDENTITY = (
    "PatientName",
    "PatientID",
    "IssuerOfPatientID",
    "OtherPatientIDs",
    "OtherPatientIDsSequence",
    "OtherPatientNames",
    "PatientBirthName",
    "PatientBirthDate",
    "PatientBirthTime",
    "PatientMotherBirthName",
    "PatientAddress",
    "PatientTelephoneNumbers",
    "PatientTelecomInformation",
    "PatientInsurancePlanCodeSequence",
    "PatientComments",
    "AdditionalPatientHistory",
    "ResponsiblePerson",
    "MilitaryRank",
    "MedicalRecordLocator",
    "AccessionNumber",
    "StudyID",
    "AdmissionID",
    "RequestingPhysician",
    "ReferringPhysicianName",
    "ReferringPhysicianAddress",
    "ReferringPhysicianTelephoneNumbers",
    "ConsultingPhysicianName",
    "PhysiciansOfRecord",
    "PerformingPhysicianName",
    "NameOfPhysiciansReadingStudy",
    "OperatorsName",
    "InstitutionName",
    "InstitutionAddress",
    "InstitutionalDepartmentName",
    "StationName",
)
_CENTIMETRE, _TWO_DIMENSIONS = 3, 1  # PS3.3, C.8.5.5.1.15 and C.8.5.5.1.1


def identity(dataset: "Dataset") -> tuple[str, ...]:
    """Names, never values, of the filled attributes that tell who the patient is, or who took the image and where."""
    return tuple(name for name in _IDENTITY if str(dataset.get(name) or "").strip())


def annotated(dataset: "Dataset") -> bool | None:
    """BurnedInAnnotation; None where it says neither YES nor NO."""
    return {"YES": True, "NO": False}.get(str(dataset.get("BurnedInAnnotation") or "").strip().upper())


def spacing(dataset: "Dataset") -> tuple[float, float] | None:
    """(down, across) in mm of an image that is not placed in the patient.

    Ultrasound says it region by region: where it does, all regions must agree. Else it is as calibrated, else as
    measured at the detector; None where none of these is two numbers.
    """
    regions = [region for region in dataset.get("SequenceOfUltrasoundRegions") or [] if _flat(region)]
    if regions:
        return _agreed([_region(region) for region in regions])
    for name in ("PixelSpacing", "ImagerPixelSpacing"):
        given = dataset.get(name)
        if given is None or isinstance(given, str | float) or len(given) != 2:
            continue
        if (sides := _positive(float(given[0]), float(given[1]))) is not None:
            return sides
    return None


def _flat(region: "Dataset") -> bool:
    return bool(region.get("RegionSpatialFormat") == _TWO_DIMENSIONS)


def _region(region: "Dataset") -> tuple[float, float] | None:
    if not region.get("PhysicalUnitsXDirection") == region.get("PhysicalUnitsYDirection") == _CENTIMETRE:
        return None
    down, across = (float(region.get(name) or 0) for name in ("PhysicalDeltaY", "PhysicalDeltaX"))
    return _positive(10 * abs(down), 10 * abs(across))  # the sign is the direction in which the scale grows


def _agreed(found: list[tuple[float, float] | None]) -> tuple[float, float] | None:
    known = [one for one in found if one is not None]
    return known[0] if len(known) == len(found) and np.allclose(known, known[0], rtol=1e-3, atol=0) else None


def _positive(down: float, across: float) -> tuple[float, float] | None:
    return (down, across) if np.isfinite([down, across]).all() and min(down, across) > 0 else None
