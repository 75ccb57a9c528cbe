"""Export: trained models as the files of other libraries."""
